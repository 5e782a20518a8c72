"""What the output of a layer is added to, such as a block's shortcut."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm

from ccp_ext.counting import as_arguments
from ccp_ext.cutting import CONVOLUTIONS
from ccp_ext.evaluation import training_flags_kept
from ccp_ext.graph.calls import Calls, users
from ccp_ext.graph.channels import Tap
from ccp_ext.graph.propagate import is_tensor, shape
from ccp_ext.graph.rules import operator_name
from ccp_ext.graph.tracing import exported, random_state_kept


def addends(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> dict[str, Tap]:
    """Where to read the other operand of the addition that a layer's output goes into.

    Args:
        model, example_inputs: as for :func:`ccp_ext.trace`.

    Returns:
        By path, for each convolution and linear layer that runs once and whose output, behind one
        BatchNorm at most, does nothing but enter an addition with another tensor of its shape. A
        layer is missing where that tensor is neither the output nor the input of a module.

    Raises:
        InputError: the model cannot be exported.
    """
    with training_flags_kept(model), random_state_kept(model):
        model.eval()
        program = exported(model, as_arguments(example_inputs))
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            other = _other_operand(program.calls, path)
            place = None if other is None else program.calls.place(other)
            if place is not None:
                channel = 1 if isinstance(module, CONVOLUTIONS) else -1
                found[path] = Tap(*place, channel)
    return found


def _other_operand(calls: Calls, path: str) -> Node | None:
    runs = calls.of_module(path)
    node = calls.output(runs[0]) if len(runs) == 1 else None
    norms = 0
    while node is not None:
        following = users(node)
        if len(following) != 1:
            return None
        (user,) = following
        if operator_name(user) == "add":
            return _partner(user, node)
        call = calls.of(user)
        is_norm = call is not None and isinstance(call.module, _BatchNorm)
        norms += is_norm
        is_alone = (is_norm and norms == 1) or operator_name(user) == "dropout"
        node = user if is_alone else None
    return None


def _partner(addition: Node, node: Node) -> Node | None:
    """The operand besides ``node``, if both enter as they are."""
    if addition.kwargs.get("alpha", 1) != 1 or not all(map(is_tensor, addition.args)):
        return None
    others = [operand for operand in addition.args if operand is not node]
    return others[0] if len(others) == 1 and shape(others[0]) == shape(node) else None
