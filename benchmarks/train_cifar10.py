"""Train a plain network for the comparisons, such as VGG-16 or MobileNetV2 on CIFAR-10.

    python -m benchmarks.train_cifar10 --model vgg16 --data data/cifar10 --output build/vgg16.pt

SGD with Nesterov momentum and a cosine schedule on random crops and flips. An interrupted training
goes on from its last epoch; a network that is there is evaluated again and left alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ccp_ext import datasets
from ccp_ext.checkpoints import load_model, model_factory
from ccp_ext.evaluation import evaluate
from ccp_ext.files import atomic_path
from ccp_ext.finetune import FinetuneConfig, finetune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="such as vgg16")
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True, type=Path, help="file for the state dict")
    parser.add_argument("--epochs", type=int, default=160)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    train, test = (datasets.load(options.data, split) for split in ("train", "test"))
    factory = model_factory(options.model, train.num_classes, train.images.shape[1])
    checkpoint = options.output.with_suffix(".training.pt")
    if not options.output.is_file():
        torch.manual_seed(options.seed)
        _train(factory(), train, options, checkpoint)
    checkpoint.unlink(missing_ok=True)
    model = load_model(factory, options.output)
    print(f"{options.model}: {evaluate(model, test, device=options.device).accuracy:.2f} % of test")


def _train(
    model: torch.nn.Module, train: datasets.ImageSet, options: argparse.Namespace, checkpoint: Path
) -> None:
    config = FinetuneConfig(
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        warmup_epochs=min(5, options.epochs / 10),
        weight_decay=5e-4,
        augment="crop_flip",
        seed=options.seed,
        channels_last=True,
        amp=True,
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    finetune(model, train, config, device=options.device, checkpoint=checkpoint)
    with atomic_path(options.output) as temporary:
        torch.save(model.cpu().state_dict(), temporary)


if __name__ == "__main__":
    main()
