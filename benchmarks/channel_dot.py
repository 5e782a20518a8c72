"""channel_dot beside the same in plain torch and Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import triton_kernels
from benchmarks.operation import Candidate, Case, Operation, Work
from ccp_ext import ops, reference


class ChannelDot(Operation):
    name = "channel_dot"

    def inputs(self, case: Case) -> tuple[Tensor, Tensor]:
        return case.random(), case.random()

    def candidates(self, case: Case) -> dict[str, Candidate]:
        return {
            "ours": ops.channel_dot,
            "eager": lambda x, g: (x * g).sum((2, 3), dtype=torch.float32),
            "einsum": lambda x, g: torch.einsum("nchw,nchw->nc", x, g),
            "triton": triton_kernels.channel_dot,
        }

    def reference(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return reference.channel_dot(x, g), reference.channel_dot(x.abs(), g.abs())

    def work(self, case: Case) -> Work:
        n, c = case.shape[:2]
        read = 2 * case.elements * case.dtype.itemsize
        return Work(read + 4 * n * c, scalar=2 * case.elements, streams=2)
