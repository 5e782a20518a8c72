"""Which nodes of an exported graph belong to which call of which module."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.fx import Node


@dataclass
class Call:
    """One call of one module.

    Attributes:
        path: of the module; the first one if it has several.
        module: the module.
        nodes: the operators that it ran, in order.
    """

    path: str
    module: nn.Module
    nodes: list[Node] = field(default_factory=list)


class Calls:
    """The calls of all leaf modules of a model, from the stacks that torch.export records."""

    def __init__(self, model: nn.Module, nodes: list[Node], constants: Collection[Node]) -> None:
        """``constants`` are the nodes that stand for parameters, buffers and constants."""
        self._first_paths = {id(m): name for name, m in model.named_modules()}
        self._owners: dict[int, list[str]] = {}
        for path, module in model.named_modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self._owners.setdefault(id(tensor), []).append(path)
        self._model = model
        self._constants = constants
        self._by_key: dict[str, Call] = {}
        self._innermost: dict[Node, str] = {}
        self._of_module: dict[str, list[Call]] = {}
        for node in nodes:
            self._add(node)

    def of(self, node: Node) -> Call | None:
        """The call that ran the node; None outside of all modules."""
        key = self._innermost.get(node)
        return None if key is None else self._by_key[key]

    def of_module(self, path: str) -> list[Call]:
        """All calls of the module, in order."""
        return self._of_module.get(path, [])

    def only_call(self, node: Node) -> Call | None:
        """The call that ran the node, if it is the one call of a leaf module."""
        call = self.of(node)
        is_leaf = call is not None and next(call.module.children(), None) is None
        return call if is_leaf and len(self.of_module(call.path)) == 1 else None

    def output(self, call: Call) -> Node | None:
        """The only node of the call whose value leaves it; None if there are several."""
        inside = set(call.nodes)
        leaving = [n for n in call.nodes if any(user not in inside for user in users(n))]
        return leaving[0] if len(leaving) == 1 else None

    def input(self, call: Call) -> Node | None:
        """The only computed tensor that enters the call; None if there are several."""
        outside = set(call.nodes).union(self._constants)
        entering = {n for node in call.nodes for n in node.all_input_nodes if n not in outside}
        return entering.pop() if len(entering) == 1 else None

    def place(self, node: Node) -> tuple[str, str] | None:
        """(path, "output" or "input") of a leaf module, called once, where the value can be read.

        None if there is none.
        """
        call = self.only_call(node)
        if call is not None and self.output(call) is node:
            return call.path, "output"
        for user in users(node):
            call = self.only_call(user)
            if call is not None and self.input(call) is node:
                return call.path, "input"
        return None

    def owners(self, tensor: Tensor | None) -> list[str]:
        """Paths of the modules that hold the parameter or buffer."""
        return self._owners.get(id(tensor), [])

    def _add(self, node: Node) -> None:
        stack = node.meta.get("nn_module_stack") or {}
        for key, (path, _) in stack.items():
            if key not in self._by_key:
                module = self._model.get_submodule(path.partition("@")[0])
                call = Call(self._first_paths[id(module)], module)
                self._by_key[key] = call
                self._of_module.setdefault(call.path, []).append(call)
            self._by_key[key].nodes.append(node)
            self._innermost[node] = key


def users(node: Node) -> list[Node]:
    """The nodes that read the value; assertions do not."""
    return [user for user in node.users if "_assert" not in str(user.target)]
