"""Auxiliary classifiers: small heads inside the network, whose losses reach its early layers.

The heads are those of DCP (Zhuang et al., NeurIPS 2018): BatchNorm, ReLU, global average pooling
and a linear layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from ccp_ext.activations import input_tap, read_at
from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.evaluation import place, training_flags_kept
from ccp_ext.graph import ChannelGraph, Tap
from ccp_ext.progress import tqdm


class Head(nn.Module):
    """BatchNorm, ReLU, mean over positions, linear: ``[N, C, ...]`` to logits ``[N, K]``."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        positions = relu(self.norm(x.flatten(2) if x.dim() > 2 else x))
        return self.linear(positions.mean(2) if positions.dim() > 2 else positions)


class AuxiliaryHeads(nn.Module):
    """Heads that read tensors of another model while it runs.

    ::

        heads = AuxiliaryHeads(taps, channels, num_classes)
        with heads.attached(model):
            logits = model(x)
            auxiliary = heads()         # one [N, K] for each tap, in the same autograd graph

    Args:
        taps: the tensors, with the channel in their dimension 1.
        channels: how many channels each has.
        num_classes: K.
    """

    def __init__(self, taps: tuple[Tap, ...], channels: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.taps = taps
        self.heads = nn.ModuleList(Head(c, num_classes) for c in channels)
        self._logits: dict[Tap, Tensor] = {}

    @classmethod
    def spread(
        cls, model: nn.Module, graph: ChannelGraph, num_classes: int, *, count: int = 3
    ) -> AuxiliaryHeads:
        """Heads at ``count`` depths (fewer if the graph is small), on the device of the model.

        They read the inputs of the layers that make the channels of groups at equal distances in
        the order of the forward pass: in a residual network with inner groups, the stream that
        enters a block.
        """
        groups = [g for g in graph.groups if not g.coupled] or list(graph.groups)
        paths = dict.fromkeys(
            groups[k * len(groups) // (count + 1)].producers[0].module for k in range(1, count + 1)
        )
        layers = [model.get_submodule(path) for path in paths]
        taps = tuple(input_tap(layer, path) for path, layer in zip(paths, layers, strict=True))
        channels = tuple(layer.weight.shape[1] for layer in layers)
        return cls(taps, channels, num_classes).to(next(model.parameters()).device)

    @contextlib.contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the heads see every forward pass of the model."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._logits.clear)
            for tap, head in zip(self.taps, self.heads, strict=True):
                stack.callback(read_at(model, tap, partial(self._read, tap, head)).remove)
            yield

    def forward(self) -> list[Tensor]:
        """The heads' logits for the model's last forward pass."""
        return [self._logits[tap] for tap in self.taps]

    def _read(self, tap: Tap, head: Head, x: Tensor) -> None:
        # At once, since the model may change the tensor in place.
        with torch.set_grad_enabled(self.training or torch.is_grad_enabled()):
            self._logits[tap] = head(x.movedim(tap.channel_dim, 1))


def train_heads(
    model: nn.Module,
    heads: AuxiliaryHeads,
    images: ImageSet,
    *,
    epochs: int = 5,
    learning_rate: float = 1e-2,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> float:
    """Train the heads on the features of the model as it is, with Adam.

    The model runs in eval mode without gradients. Afterwards the heads are in eval mode.

    Args:
        learning_rate: falls to zero along a cosine.
        seed: of the order of the images.

    Returns:
        The mean cross-entropy of a head in the last epoch, in nats.
    """
    device = place(model, None)
    heads.train()
    optimizer = torch.optim.Adam(heads.parameters(), learning_rate)
    steps = epochs * images.num_batches(batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    mean = float("nan")
    with training_flags_kept(model), heads.attached(model):
        model.eval()
        bar = tqdm(range(epochs), "auxiliary heads", disable=not progress, leave=False)
        for epoch in bar:
            total = 0.0
            for x, y in images.batches(batch_size, True, seed + epoch, device=device):
                if len(x) < 2 <= len(images):  # BatchNorm needs two values
                    continue
                with torch.no_grad():
                    model(x)
                loss = sum(cross_entropy(logits, y) for logits in heads())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(x)
            mean = total / len(images) / len(heads.heads)
    heads.eval()
    return mean
