"""Which convolution feeds another one, with nothing but a BatchNorm and a ReLU between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ccp_ext.counting import as_arguments
from ccp_ext.cutting import CONVOLUTIONS
from ccp_ext.evaluation import training_flags_kept
from ccp_ext.graph.calls import Call, Calls, users
from ccp_ext.graph.propagate import is_tensor
from ccp_ext.graph.rules import operator_name
from ccp_ext.graph.tracing import exported, random_state_kept


@dataclass(frozen=True)
class Feeder:
    """A convolution whose output only another one reads, as relu(norm(output)).

    Attributes:
        path: of the convolution.
        norm: of the BatchNorm behind it; None if there is none.
    """

    path: str
    norm: str | None


def feeders(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> dict[str, Feeder]:
    """The feeder of each convolution that has one, by its path; all of them run once.

    Args:
        model, example_inputs: as for :func:`ccp_ext.trace`.

    Raises:
        InputError: the model cannot be exported.
    """
    with training_flags_kept(model), random_state_kept(model):
        model.eval()
        calls = exported(model, as_arguments(example_inputs)).calls
    found = {}
    for path, module in model.named_modules():
        runs = calls.of_module(path) if isinstance(module, CONVOLUTIONS) else []
        feeder = _feeder(calls, runs[0]) if len(runs) == 1 else None
        if feeder is not None:
            found[path] = feeder
    return found


def _feeder(calls: Calls, reader: Call) -> Feeder | None:
    node, norm, rectified = calls.input(reader), None, False
    while node is not None and len(users(node)) == 1:
        call, name = calls.only_call(node), operator_name(node)
        module = None if call is None else call.module
        if isinstance(module, CONVOLUTIONS):
            return Feeder(call.path, norm) if rectified else None
        if isinstance(module, _BatchNorm) and rectified and norm is None:
            norm = call.path
        elif name == "relu" and norm is None:
            rectified = True
        elif name != "dropout":
            return None
        node = node.args[0] if is_tensor(node.args[0]) else None
    return None
