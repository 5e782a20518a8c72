"""What the removal of inputs costs once the inputs that stay were refitted by least squares.

For a layer with weight W [O, C b] (b columns for each of C channels) and the second moments
H [C b, C b] of what it reads, removing the channels R and choosing the other weights anew leaves

    1/2 tr(W_R ((H^-1)_RR)^-1 W_R')

of mean squared error (Hassibi and Stork, NeurIPS 1993, for blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ccp_ext.errors import InputError


class RefitProblem:
    """One layer's weight and second moments.

    Args:
        H: ``[C b, C b]``, positive semidefinite; the columns of a channel lie together.
        W: ``[O, C b]``.
        channels: C.
        ridge: added to H's diagonal, in units of its mean.
    """

    def __init__(self, H: Tensor, W: Tensor, channels: int, ridge: float) -> None:
        H, self.W = H.detach().double(), W.detach().double()
        mean = H.diagonal().mean()
        # Where all inputs are zero nothing can be lost.
        shift = ridge * mean if mean > 0 else 1e-30
        self.H = H + shift * torch.eye(len(H), dtype=H.dtype, device=H.device)
        self.channels = channels
        self.block = len(H) // channels

    @cached_property
    def inverse(self) -> Tensor:
        try:
            return torch.cholesky_inverse(torch.linalg.cholesky(self.H))
        except torch.linalg.LinAlgError as error:
            raise InputError(
                "the moments of a layer's inputs are singular; use more images or a larger ridge"
            ) from error

    def loss(self, removed: Tensor) -> float:
        """What removing the channels of the bool mask [C] costs."""
        columns = removed.to(self.W.device).repeat_interleave(self.block)
        if not columns.any():
            return 0.0
        W = self.W[:, columns]
        return 0.5 * (W * torch.linalg.solve(self.inverse[columns][:, columns], W.T).T).sum().item()

    def singles(self) -> Tensor:
        """float64 ``[C]``: the cost of removing one channel."""
        return _State(self).scores()

    def pairs(self) -> Tensor:
        """float64 ``[C, C]``: the cost of removing i and j; i alone on the diagonal."""
        size, step = self.channels, self.block
        inverse = self.inverse.view(size, step, size, step).transpose(1, 2)  # [C, C, b, b]
        gram = (self.W.T @ self.W).view(size, step, size, step).transpose(1, 2)
        costs = torch.diag(self.singles())
        for i in range(size - 1):
            j = torch.arange(i + 1, size)
            pair = [_two_by_two(m, i, j) for m in (inverse, gram)]
            costs[i, j] = costs[j, i] = _block_cost(*pair)
        return costs


class GreedyPath(NamedTuple):
    """What greedy removal takes, and what it costs.

    Attributes:
        order: int64 ``[C]`` on the CPU, channels in the order of their removal.
        losses: float64 ``[C + 1]``, what removing the first 0, 1, ..., C of them costs.
    """

    order: Tensor
    losses: Tensor


def greedy_path(problems: Sequence[RefitProblem]) -> GreedyPath:
    """Remove channel after channel, each time the one that costs least, with a refit after each.

    Args:
        problems: layers that read the same channels; their costs add up.
    """
    states = [_State(problem) for problem in problems]
    left = torch.ones(problems[0].channels, dtype=torch.bool)
    order, losses = [], [0.0]
    for _ in range(len(left)):
        scores = sum(state.scores().cpu() for state in states)
        scores[~left] = torch.inf
        channel = int(scores.argmin())
        left[channel] = False
        order.append(channel)
        losses.append(losses[-1] + float(scores[channel]))
        if left.any():
            for state in states:
                state.remove(channel)
    return GreedyPath(torch.tensor(order), torch.tensor(losses, dtype=torch.float64))


class _State:
    """Weights and inverse of the channels that are left; those of the others are zero."""

    def __init__(self, problem: RefitProblem) -> None:
        self.W, self.inverse = problem.W.clone(), problem.inverse.clone()
        self.size, self.step = problem.channels, problem.block
        self.gone = torch.zeros(self.size, dtype=torch.bool, device=self.W.device)

    def scores(self) -> Tensor:
        own = torch.arange(self.size, device=self.W.device)
        blocks = self.inverse.view(self.size, self.step, self.size, self.step)[own, :, own]
        blocks[self.gone] = torch.eye(self.step, dtype=blocks.dtype, device=blocks.device)
        W = self.W.view(-1, self.size, self.step).transpose(0, 1)  # [C, O, b]
        return _block_cost(blocks, W.mT @ W)

    def remove(self, channel: int) -> None:
        columns = slice(channel * self.step, (channel + 1) * self.step)
        # (H^-1)_cc^-1 (H^-1)_c: what the others take over.
        share = torch.linalg.solve(self.inverse[columns, columns], self.inverse[columns])
        self.W -= self.W[:, columns] @ share
        self.inverse -= self.inverse[:, columns] @ share
        self.W[:, columns] = 0
        self.inverse[columns] = 0
        self.inverse[:, columns] = 0
        self.gone[channel] = True


def _block_cost(inverse: Tensor, gram: Tensor) -> Tensor:
    """1/2 tr(inverse^-1 gram) of each of ``[K, n, n]`` blocks: ``[K]``."""
    return 0.5 * torch.linalg.solve(inverse, gram).diagonal(dim1=-2, dim2=-1).sum(-1)


def _two_by_two(blocks: Tensor, i: int, j: Tensor) -> Tensor:
    """The blocks of the pairs (i, j[k]): ``[K, 2b, 2b]`` of ``[C, C, b, b]``."""
    own = blocks[i, i].expand(len(j), -1, -1)
    upper = torch.cat([own, blocks[i, j]], 2)
    lower = torch.cat([blocks[j, i], blocks[j, j]], 2)
    return torch.cat([upper, lower], 1)
