"""channel_moments beside one torch reduction for each moment."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import triton_kernels
from benchmarks.operation import Candidate, Case, Operation, Work
from ccp_ext import ops, reference

ALL_BUT_CHANNEL = (0, 2, 3)


class ChannelMoments(Operation):
    name = "channel_moments"

    def inputs(self, case: Case) -> tuple[Tensor]:
        return (case.activations(),)

    def candidates(self, case: Case) -> dict[str, Candidate]:
        return {
            "ours": lambda x: ops.channel_moments(x)[:5],
            "eager": _reductions,
            "var_mean": _batch_norm_moments,
            "triton": triton_kernels.channel_moments,
        }

    def reference(self, x: Tensor) -> tuple[Tensor, Tensor]:
        moments = reference.channel_moments(x)
        return moments, moments.abs()  # activations are not negative, so |terms| are the terms

    def work(self, case: Case) -> Work:
        read = case.elements * case.dtype.itemsize
        return Work(read + 5 * 8 * case.shape[1], scalar=6 * case.elements)


def _reductions(x: Tensor) -> tuple[Tensor, ...]:
    square_sum = x.float().square().sum(ALL_BUT_CHANNEL)
    return x.sum(ALL_BUT_CHANNEL, dtype=torch.float32), square_sum, *_zeros_and_range(x)


def _batch_norm_moments(x: Tensor) -> tuple[Tensor, ...]:
    """Mean and variance in one pass; from them the sums."""
    variance, mean = torch.var_mean(x.float(), ALL_BUT_CHANNEL, correction=0)
    count = x.numel() // x.shape[1]
    return count * mean, count * (variance + mean.square()), *_zeros_and_range(x)


def _zeros_and_range(x: Tensor) -> tuple[Tensor, ...]:
    return (x == 0).sum(ALL_BUT_CHANNEL), x.amin(ALL_BUT_CHANNEL), x.amax(ALL_BUT_CHANNEL)
