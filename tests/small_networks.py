"""Small networks and helpers that several test files share."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from ccp_ext.plan import PruningPlan


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every normalisation statistics and factors of its own, so that nothing is symmetric."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
            ):
                if tensor is not None:
                    uniform = torch.rand(tensor.shape, generator=generator)
                    tensor.data.copy_(low + (high - low) * uniform)
    return model


def random_plan(graph, share: float = 0.5, seed: int = 0, record=None) -> PruningPlan:
    """Keep a random ``share`` of the channels of every group, at least one."""
    generator = torch.Generator().manual_seed(seed)
    kept = {
        g.name: torch.randperm(g.channels, generator=generator)[: max(1, int(g.channels * share))]
        for g in graph.groups
    }
    return PruningPlan.from_kept(graph, kept, record)


def output(model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """The output in eval mode; the model is left in eval mode."""
    with torch.no_grad():
        return model.eval()(*inputs)


@contextlib.contextmanager
def gates_closed(model: nn.Module, graph, plan: PruningPlan):
    """Set the removed channels to zero at the gate taps: the plain model as the pruned one."""
    with contextlib.ExitStack() as stack:
        for group in graph.groups:
            kept = set(plan.groups[group.name].kept) if group.name in plan.groups else None
            gone = [] if kept is None else sorted(set(range(group.channels)) - kept)
            for tap in group.gate_taps:
                module = model.get_submodule(tap.module)
                index = gone if tap.index is None else [tap.index[i] for i in gone]
                stack.callback(_close(module, tap, torch.tensor(index)).remove)
        yield


def _close(module: nn.Module, tap, index: torch.Tensor):
    if tap.port == "output":
        return module.register_forward_hook(
            lambda module, args, out: out.index_fill(tap.channel_dim, index, 0)
        )
    # In place, because other modules may read the tensor too.
    return module.register_forward_pre_hook(
        lambda module, args: _discard(args[0].index_fill_(tap.channel_dim, index, 0))
    )


def _discard(value: torch.Tensor) -> None:
    """A forward pre-hook must return None to leave its arguments alone."""


class Concat(nn.Module):
    """Two branches of different widths, concatenated, flattened and read by a linear layer."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 10, 1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 16, 5)

    def forward(self, x):
        y = F.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        return self.head(F.max_pool2d(y, 2).flatten(1))


class SqueezeExcite(nn.Module):
    """Channels scaled by a branch whose views spell out sizes taken from the input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.squeeze = nn.Linear(8, 4)
        self.excite = nn.Linear(4, 8)
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = F.silu(self.bn(self.conv(x)))
        n, c, _, _ = x.shape
        scale = F.adaptive_avg_pool2d(x, 1).view(n, c)
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(scale)))).view(n, c, 1, 1)
        return self.last(x * scale).mean((2, 3))


class Shared(nn.Module):
    """One convolution and one ReLU module, each called twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = self.relu(self.first(x))
        x = self.relu(self.again(x))
        return self.last(F.relu(self.again(x))).mean((2, 3))


class InPlace(nn.Module):
    """In-place activations and additions, functional ones among them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.prelu = nn.PReLU(8)
        self.wide = nn.Conv2d(8, 12, 1)
        self.last = nn.Conv2d(12, 5, 1)

    def forward(self, x):
        x = self.first(x)
        F.relu_(x)
        y = self.prelu(self.second(x))
        y += x
        return self.last(F.dropout(F.relu6(self.wide(y), inplace=True), 0.1, False)).amax((2, 3))


class Tokens(nn.Module):
    """Linear layers along the last dimension, a permutation, and a convolution over positions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 4, 4)
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.permute(0, 2, 1).mean(-1))


class Depthwise(nn.Module):
    """A depthwise convolution with two outputs for each channel, and a flattening in two steps."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.depthwise = nn.Conv2d(6, 12, 3, stride=2, groups=6)
        self.norm = nn.BatchNorm2d(12)
        self.flat_norm = nn.BatchNorm1d(12 * 9)
        self.head = nn.Linear(12 * 9, 5)

    def forward(self, x):
        x = self.norm(self.depthwise(torch.tanh(self.first(x))))
        return self.head(self.flat_norm(x.reshape(x.shape[0], x.shape[1], -1).flatten(1)))


SMALL_NETWORKS = (Concat, SqueezeExcite, Shared, InPlace, Tokens, Depthwise)
