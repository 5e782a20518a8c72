"""What one forward pass computes, and what a model holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ccp_ext.errors import InputError
from ccp_ext.evaluation import training_flags_kept


def macs(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> int:
    """Multiply-accumulate operations of one forward pass on the example inputs, all samples.

    Counts convolutions and matrix products as they are executed; additions of a bias,
    normalisations and activations count nothing.

    Args:
        example_inputs: a tensor, or the tensors of the positional arguments.
    """
    counter = FlopCounterMode(display=False)
    with inference(model), counter:
        model(*as_arguments(example_inputs))
    return counter.get_total_flops() // 2


def parameters(model: nn.Module) -> int:
    """The number of parameters; one that is shared counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def as_arguments(example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The positional arguments that ``example_inputs`` stands for.

    Raises:
        InputError: it is neither a tensor nor a non-empty sequence of tensors.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    is_sequence = isinstance(example_inputs, list | tuple)
    if not is_sequence or not example_inputs:
        raise InputError(
            "example_inputs must be a tensor or a non-empty sequence of tensors, "
            f"got {type(example_inputs).__name__}"
        )
    for i, value in enumerate(example_inputs):
        if not isinstance(value, Tensor):
            raise InputError(f"example_inputs[{i}] must be a tensor, got {type(value).__name__}")
    return tuple(example_inputs)


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the training flags come back."""
    with training_flags_kept(model), torch.no_grad():
        model.eval()
        yield
