"""Watching tensors inside a model while the user runs forward and backward passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ccp_ext import ops
from ccp_ext.errors import InputError
from ccp_ext.graph import Tap

Forward = TypeVar("Forward")


@dataclass
class _Source:
    """A tensor to observe, and the groups whose channels it carries."""

    module: nn.Module
    tap: Tap
    subtract_bias: bool
    readers: list[tuple[str, Tensor | None]] = field(default_factory=list)  # (group, index)
    copy: bool = False  # the model changes the tensor in place after we saw it

    @property
    def name(self) -> str:
        return f"the {self.tap.port} of module {self.tap.module!r}"

    def parts(self, a: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Of the tensor's derivatives [N, C] those of each group."""
        for k, (group, index) in enumerate(self.readers):
            if index is not None and index.device != a.device:  # once, not in every batch
                index = index.to(a.device)
                self.readers[k] = (group, index)
            yield group, a if index is None else a.index_select(1, index)

    def derivatives(self, values: Tensor, gradient: Tensor) -> Tensor:
        """[N, C]: the loss's derivative along each channel of the tensor (or of its filter)."""
        a = ops.channel_dot(values, gradient, self.tap.channel_dim)
        if not self.subtract_bias:
            return a
        # The output is filter response plus bias, and only the former is the filter's doing.
        bias = self.module.bias.detach().to(a.dtype)
        return a - bias * _channel_sum(gradient, self.tap.channel_dim, a.dtype)


class Observer(Generic[Forward]):
    """Delivers the derivatives along the channels of chosen tensors; use it with ``with``.

    Inside the block every BatchNorm is in eval mode and, with ``freeze``, no parameter requires a
    gradient; both are put back afterwards.

    Args:
        model: the network.
        taps: by group, the tensors that carry its channels.
        of_filter: at the output of a layer with a bias, leave the bias out.
        freeze: spare the parameters' gradients.
        begin: called when a forward pass starts; what it returns is handed to ``deliver``.
        deliver: called in a backward pass with (that object, group, derivatives [N, C]).

    Raises:
        InputError: the model lacks a module of ``taps``.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Mapping[str, Sequence[Tap]],
        *,
        of_filter: bool,
        freeze: bool,
        begin: Callable[[], Forward],
        deliver: Callable[[Forward, str, Tensor], None],
    ) -> None:
        self.model = model
        self.freeze = freeze
        self._begin, self._deliver = begin, deliver
        self._sources = _sources(model, taps, of_filter)
        self._anchor = torch.zeros((), requires_grad=True)
        self._forward: Forward | None = None
        self._inside_forward = False
        self._seen: list[tuple[_Source, Tensor, int]] = []  # in this forward pass, with versions
        self._rerunning = False
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Observer[Forward]:
        with contextlib.ExitStack() as stack:
            # What torch.compile makes of hooks on tensors fails or not with its backend, and the
            # model would be compiled again for the observation alone.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            _put_batchnorm_into_eval_mode(self.model, stack)
            if self.freeze:
                _freeze_parameters(self.model, stack)
            handles = [
                self.model.register_forward_pre_hook(self._before_forward),
                *(m.register_forward_hook(self._connect) for m in _with_parameters(self.model)),
                *(self._hook(source) for source in self._sources),
                self.model.register_forward_hook(self._after_forward, with_kwargs=True),
            ]
            for handle in handles:
                stack.callback(handle.remove)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()
        self._forward, self._seen = None, []

    def _hook(self, source: _Source) -> RemovableHandle:
        if source.tap.port == "input":
            return source.module.register_forward_pre_hook(
                lambda module, args, kwargs: self._watch(source, _first(args, kwargs)),
                with_kwargs=True,
            )
        return source.module.register_forward_hook(
            lambda module, args, output: self._watch(source, output)
        )

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        for name, batchnorm in _batchnorms(self.model):
            if batchnorm.training:
                raise RuntimeError(
                    f"collect: BatchNorm {name!r} was put into training mode while statistics are "
                    "gathered; it must stay in eval mode, since batch statistics mix the samples"
                )
        if torch.is_grad_enabled():
            self._start()

    def _start(self) -> None:
        self._forward = self._begin()
        self._inside_forward = True
        self._seen = []

    def _connect(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Let gradients reach back to the first layer with parameters, though these are frozen.

        Whoever reads a tensor before it is observed must already see that it has a gradient.
        """
        if isinstance(output, Tensor) and _lacks_gradient(output):
            _RequireGradient.apply(output, self._anchor)

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Run the forward pass again, with copies, if the model overwrote what we must remember.

        That happens in the first batch only: from then on these tensors are copied when seen.
        """
        overwritten = [source for source, tensor, v in self._seen if tensor._version != v]
        self._inside_forward, self._seen = False, []
        if not overwritten or self._rerunning:
            return None
        for source in overwritten:
            source.copy = True
        self._rerunning = True
        try:
            self._start()
            return module.forward(*args, **kwargs)
        finally:
            self._rerunning = self._inside_forward = False
            self._seen = []

    def _watch(self, source: _Source, tensor: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        if not isinstance(tensor, Tensor):
            raise InputError(
                f"collect: {source.name} must be a tensor, got {type(tensor).__name__}"
            )
        # Activation checkpointing runs parts of the model again, in the backward pass.
        if not self._inside_forward and torch._C._current_graph_task_id() == -1:
            raise RuntimeError(
                f"collect: module {source.tap.module!r} was called by itself; call the whole "
                "model, so that the samples of one batch are known to belong together"
            )
        if _lacks_gradient(tensor):
            if source.tap.port == "input":
                raise InputError(
                    f"collect: {source.name} cannot be observed, since no layer made it; observe "
                    "the output of a module"
                )
            _RequireGradient.apply(tensor, self._anchor)
        values = tensor.detach()
        if source.copy:
            values = values.clone()
        elif self._inside_forward:
            self._seen.append((source, values, values._version))
        # `values` shares the version counter, so a change in place shows when the gradient comes.
        tensor.register_hook(partial(self._receive, source, self._forward, values, values._version))

    def _receive(
        self, source: _Source, forward: Forward, values: Tensor, version: int, gradient: Tensor
    ) -> None:
        if values._version != version:
            raise RuntimeError(
                f"collect: {source.name} was changed in place after the model's forward pass"
            )
        for group, a in source.parts(source.derivatives(values, gradient)):
            self._deliver(forward, group, a)


class _RequireGradient(torch.autograd.Function):
    """Make a tensor part of the autograd graph in place, without a copy.

    Unlike ``requires_grad_()`` this leaves a non-leaf, on which in-place operators still work.
    """

    @staticmethod
    def forward(ctx, tensor: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        return None, None


def _sources(model: nn.Module, taps: Mapping[str, Sequence[Tap]], of_filter: bool) -> list[_Source]:
    """One source a tensor, though several groups may read channels of it."""
    modules = dict(model.named_modules())
    found: dict[tuple[str, str, int], _Source] = {}
    for group, group_taps in taps.items():
        for tap in group_taps:
            module = modules.get(tap.module)
            if module is None:
                raise InputError(
                    f"collect: the model has no module {tap.module!r} (group {group!r})"
                )
            key = (tap.module, tap.port, tap.channel_dim)
            if key not in found:
                biased = of_filter and tap.port == "output" and _has_biased_filter(module)
                found[key] = _Source(module, tap, biased)
            index = None if tap.index is None else torch.tensor(tap.index)
            found[key].readers.append((group, index))
    return list(found.values())


def _with_parameters(model: nn.Module) -> Iterator[nn.Module]:
    """The modules with parameters of their own; a parametrized weight belongs to its layer."""
    for module in model.modules():
        if module._parameters or nn.utils.parametrize.is_parametrized(module):
            yield module


def _lacks_gradient(tensor: Tensor) -> bool:
    differentiable = tensor.is_floating_point() and torch.is_grad_enabled()
    return differentiable and not tensor.requires_grad


def _first(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _has_biased_filter(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module.bias is not None


def _channel_sum(tensor: Tensor, channel_dim: int, dtype: torch.dtype) -> Tensor:
    positions = [d for d in range(1, tensor.dim()) if d != channel_dim % tensor.dim()]
    return tensor.sum(positions, dtype=dtype) if positions else tensor.to(dtype)


def _batchnorms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield name, module


def _put_batchnorm_into_eval_mode(model: nn.Module, stack: contextlib.ExitStack) -> None:
    for name, module in _batchnorms(model):
        if module.running_mean is None:
            raise InputError(
                f"collect: BatchNorm {name!r} has no running statistics "
                "(track_running_stats=False), so its samples cannot be told apart"
            )
        stack.callback(module.train, module.training)
        module.eval()


def _freeze_parameters(model: nn.Module, stack: contextlib.ExitStack) -> None:
    for parameter in model.parameters():
        stack.callback(parameter.requires_grad_, parameter.requires_grad)
        parameter.requires_grad_(False)
