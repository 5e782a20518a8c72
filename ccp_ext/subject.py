"""What a run works on: a model with its weights, its channels, and images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ccp_ext import datasets
from ccp_ext.checkpoints import load_model, model_factory
from ccp_ext.datasets import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.evaluation import place
from ccp_ext.finetune import FinetuneConfig
from ccp_ext.graph import ChannelGraph, trace


class Subject(Protocol):
    """What settings name: see :class:`ccp_ext.pipeline.PruneSettings`."""

    model: str
    weights: str
    data: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    scope: str
    finetune: FinetuneConfig | None


@dataclass(frozen=True)
class Inputs:
    """What a subject's names stand for, loaded; the model, on its device, in eval mode.

    Attributes:
        graph: with the groups that may be pruned.
        example: one normalised training image [1, C, H, W] on the device.
    """

    model: nn.Module
    graph: ChannelGraph
    train: ImageSet
    test: ImageSet
    example: torch.Tensor

    def contents(self) -> dict[str, str]:
        """Digests by which inputs that changed under their names are known."""
        return {
            "content of model": self.graph.fingerprint,
            "content of weights": _digest(*self.model.state_dict().values()),
            "content of data": _digest(*self.train.identity(), *self.test.identity()),
        }


def load_inputs(subject: Subject, device: torch.device | str) -> Inputs:
    """Load what the names stand for.

    Raises:
        InputError: something is missing, unreadable or does not fit, the device cannot be used, or
            no group is in the scope.
    """
    train, test = (
        datasets.load(subject.data, split, mean=subject.mean, std=subject.std)
        for split in ("train", "test")
    )
    if subject.finetune is not None:
        train.check_augmentation(subject.finetune.augment)
    factory = model_factory(subject.model, train.num_classes, train.images.shape[1])
    model = load_model(factory, subject.weights)
    example = train.normalise(train.images[:1]).to(place(model, device))
    return Inputs(model, in_scope(trace(model, example), subject.scope), train, test, example)


def in_scope(graph: ChannelGraph, scope: str) -> ChannelGraph:
    """The graph with the groups that may be pruned.

    Raises:
        InputError: an unknown scope, or no group is left.
    """
    chosen = graph.select_groups(scope)
    if not chosen.groups:
        reasons = "; ".join(f"{what}: {why}" for what, why in graph.fixed[:3])
        raise InputError(f"the model has no {scope} channels that can be removed ({reasons})")
    return chosen


def sample(images: ImageSet, count: int, seed: int, purpose: str) -> ImageSet:
    """``count`` images drawn without replacement (all of them, shuffled, if there are fewer).

    Draws of different seeds or purposes are independent.
    """
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    order = torch.randperm(len(images), generator=generator)
    return images.subset(order[:count])


def _digest(*tensors: torch.Tensor) -> str:
    """SHA-256 of the values, by which a file that changed under its name is known."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
