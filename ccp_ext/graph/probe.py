"""Running a model on fake tensors: how many operations, and does it run with fewer channels?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from ccp_ext.cutting import Cut, cut_attributes, cut_tensors
from ccp_ext.evaluation import training_flags_kept
from ccp_ext.graph.channels import ChannelGraph


class _Run(NamedTuple):
    """What a run on fake tensors shows.

    Attributes:
        shapes: of the outputs.
        numbers: (operator, numbers) of every elementwise operator that takes any, in order; the
            numbers as text, so that NaN equals NaN.
    """

    shapes: Any
    numbers: list[tuple[str, tuple[str, ...]]]


class _Numbers(TorchDispatchMode):
    """Notes the numbers that elementwise operators compute with, such as the 8 of ``x / 8``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.pointwise in func.tags:
            values = (*args, *kwargs.values())
            numbers = tuple(repr(v) for v in values if type(v) in (int, float))
            if numbers:
                self.found.append((func.overloadpacket.__name__, numbers))
        return func(*args, **kwargs)


class Probe:
    """Runs the model without computing anything.

    Attributes:
        macs: multiply-accumulate operations of one forward pass in eval mode.
    """

    def __init__(self, model: nn.Module, arguments: Sequence[Tensor], training: bool) -> None:
        """``training``: let :meth:`misfits` try training mode too, for what only it executes."""
        self._model = model
        self._tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._arguments = [self._mode.from_tensor(x) for x in arguments]
        counter = FlopCounterMode(display=False)
        with counter:
            self._expected = {False: self._run({}, training=False)}
        self.macs = counter.get_total_flops() // 2
        if training:
            # A model that cannot be trained on these inputs has nothing to compare with.
            with contextlib.suppress(Exception):
                self._expected[True] = self._run({}, training=True)

    def misfits(self, graph: ChannelGraph) -> dict[str, str]:
        """The groups that cannot lose a channel, because the model's code relies on their number.

        Returns:
            {group name: the error that the model raises}.
        """
        fewer = {g.name: range(g.channels - 1) for g in graph.groups if g.channels > 1}
        if self._error(graph, fewer) is None:
            return {}
        accepted, errors = {}, {}
        for name, kept in fewer.items():
            error = self._error(graph, {**accepted, name: kept})
            if error is None:
                accepted[name] = kept
            else:
                errors[name] = error
        return errors

    def _error(self, graph: ChannelGraph, kept: Mapping[str, Sequence[int]]) -> str | None:
        cuts = graph.cuts(kept)
        for training, expected in self._expected.items():
            try:
                found = self._run(cuts, training)
            except Exception as error:  # whatever the model's own code raises
                return str(error).strip().partition("\n")[0] or type(error).__name__
            if found.shapes != expected.shapes:
                return "the model's output changes its shape"
            if found.numbers != expected.numbers:
                return _difference(expected, found)
        return None

    def _run(self, cuts: Mapping[str, Cut], training: bool) -> _Run:
        modules = {path: self._model.get_submodule(path) for path in cuts}
        numbers = _Numbers()
        with training_flags_kept(self._model), torch.no_grad(), self._mode:
            self._model.train(training)
            tensors = {name: self._mode.from_tensor(t) for name, t in self._tensors.items()}
            tensors |= {
                f"{path}.{name}" if path else name: small
                for path, module in modules.items()
                for name, _, small in cut_tensors(path, module, cuts[path])
            }
            with _attributes(modules, cuts), numbers:
                output = torch.func.functional_call(self._model, tensors, tuple(self._arguments))
        shapes = tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, output)
        return _Run(shapes, numbers.found)


def _difference(expected: _Run, found: _Run) -> str:
    """In what the first difference between the numbers of two runs is."""
    for before, after in zip(expected.numbers, found.numbers, strict=False):
        if before[0] != after[0]:
            break
        for a, b in zip(before[1], after[1], strict=False):
            if a != b:
                return f"{before[0]} computes with {a}, with fewer channels {b}"
    return "it computes with other numbers with fewer channels"


@contextlib.contextmanager
def _attributes(modules: Mapping[str, nn.Module], cuts: Mapping[str, Cut]) -> Iterator[None]:
    """Set the attributes that follow from the cuts, for a while."""
    with contextlib.ExitStack() as stack:
        for path, module in modules.items():
            for name, value in cut_attributes(module, cuts[path]).items():
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
        yield
