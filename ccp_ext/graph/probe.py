"""Running a model on fake tensors: how many operations, and does it run with fewer channels?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from ccp_ext.cutting import Cut, cut_attributes, cut_tensors
from ccp_ext.evaluation import training_flags_kept
from ccp_ext.graph.channels import ChannelGraph


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
            self._expected = {False: self._output_shapes({}, training=False)}
        self.macs = counter.get_total_flops() // 2
        if training:
            # A model that cannot be trained on these inputs has nothing to compare with.
            with contextlib.suppress(Exception):
                self._expected[True] = self._output_shapes({}, training=True)

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
                shapes = self._output_shapes(cuts, training)
            except Exception as error:  # whatever the model's own code raises
                return str(error).strip().partition("\n")[0] or type(error).__name__
            if shapes != expected:
                return "the model's output changes its shape"
        return None

    def _output_shapes(self, cuts: Mapping[str, Cut], training: bool) -> Any:
        modules = {path: self._model.get_submodule(path) for path in cuts}
        with training_flags_kept(self._model), torch.no_grad(), self._mode:
            self._model.train(training)
            tensors = {name: self._mode.from_tensor(t) for name, t in self._tensors.items()}
            tensors |= {
                f"{path}.{name}" if path else name: small
                for path, module in modules.items()
                for name, _, small in cut_tensors(path, module, cuts[path])
            }
            with _attributes(modules, cuts):
                output = torch.func.functional_call(self._model, tensors, tuple(self._arguments))
        return tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, output)


@contextlib.contextmanager
def _attributes(modules: Mapping[str, nn.Module], cuts: Mapping[str, Cut]) -> Iterator[None]:
    """Set the attributes that follow from the cuts, for a while."""
    with contextlib.ExitStack() as stack:
        for path, module in modules.items():
            for name, value in cut_attributes(module, cuts[path]).items():
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
        yield
