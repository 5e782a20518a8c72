"""Taking channels out of a model, and keeping the slim model in a file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves_with_path

from ccp_ext import files
from ccp_ext.cutting import CONVOLUTIONS, Cut, cut_attributes, cut_tensors, fingerprint
from ccp_ext.eager import eager
from ccp_ext.errors import InputError
from ccp_ext.evaluation import training_flags_kept
from ccp_ext.graph.tracing import random_state_kept
from ccp_ext.plan import PruningPlan

# Largest difference, relative to the largest output, that another order of summation explains.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
_METADATA = "ccp_ext"
_VERSION = 1


def prune(model: nn.Module, plan: PruningPlan, *, verify: bool = True) -> nn.Module:
    """Remove channels from a model, in place.

    All Parameter and buffer objects stay the same, with smaller data and without gradients, so an
    optimizer made before still trains the model. State that an optimizer keeps from earlier steps
    (momentum) has the old shapes: make a new optimizer then. Memory format, dtype, device,
    requires_grad, training mode and hooks stay. The plan is kept as ``model.ccp_plan``, composed
    with the one of an earlier pruning.

    Args:
        model: the model that the plan was made for, or what ``torch.compile`` made of it.
        plan: what stays.
        verify: run the model on random inputs of the plan's shapes, before and after, and compare
            with :func:`masked`. Buffers that the model's code writes get their values back.

    Returns:
        The same model; of a compiled one the module behind it.

    Raises:
        InputError: the plan does not fit the model, or the pruned model fails or gives other
            outputs than the masked one, or ``verify`` is set and the model cannot be run on random
            inputs or has no finite output there. The model is then as it was.
    """
    model = eager(model)
    modules = _modules(model, plan)
    composed = plan if _plan_of(model) is None else _plan_of(model).then(plan)
    edits = [_edit(path, module, plan.modules[path]) for path, module in modules.items()]
    check = _Verification(model, plan) if verify else None
    undo = contextlib.ExitStack()
    with undo:
        for edit in edits:
            edit.apply(undo)
        if check is not None:
            check.compare()
        undo.pop_all()
    model.zero_grad(set_to_none=True)
    model.ccp_plan = composed
    return model


@contextlib.contextmanager
def masked(model: nn.Module, plan: PruningPlan) -> Iterator[nn.Module]:
    """Let the plain model behave as the pruned one: what is removed reads as zero.

    Forward pre-hooks set to zero the input channels that the plan removes from convolutions and
    linear layers. Gradients pass; they are zero where the input is.

    Args:
        model: the model that the plan was made for, not pruned.

    Yields:
        The same model; the hooks go at the end.

    Raises:
        InputError: the plan does not fit the model.
    """
    with contextlib.ExitStack() as stack:
        for path, module in _modules(model, plan).items():
            kept = plan.modules[path].inputs
            if kept is not None:
                hook = partial(_zero_removed, dim=_input_dim(module), removed=_others(module, kept))
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        yield model


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a pruned or plain model to one safetensors file.

    The file holds the state dict, and as metadata the plan, memory formats and which tensors are
    one. Equal models give equal files, to the byte. An interruption leaves the old file whole.

    Raises:
        InputError: the state dict holds something else than tensors, or the file cannot be written.
    """
    from safetensors.torch import save_file  # here: kernels are built and measured without it

    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(f"save: {name} of the state dict is a {type(value).__name__}")
    aliases = _aliases(state)
    plan = _plan_of(model)
    layouts = {name: _layout(tensor) for name, tensor in state.items()}
    content = {
        "version": _VERSION,
        "plan": None if plan is None else json.loads(plan.to_json()),
        "aliases": aliases,
        "layouts": {n: order for n, order in layouts.items() if order != sorted(order)},
    }
    # One entry, because safetensors writes several in an order that changes from run to run.
    metadata = {_METADATA: json.dumps(content, sort_keys=True)}
    # A copy where tensors overlap in memory: the format has no views.
    tensors = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
        if name not in aliases
    }
    try:
        with files.atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"save: {os.fspath(path)!r} cannot be written: {reason}") from error


def load(path: str | os.PathLike[str], model_fn: Callable[[], nn.Module]) -> nn.Module:
    """Build the model that :func:`save` wrote.

    In eval mode on the same kind of device its outputs equal those of the saved model to the bit.

    Args:
        path: the file.
        model_fn: makes the plain model; weights do not matter. Its devices stay; dtype and memory
            format come from the file.

    Raises:
        InputError: the file is missing, broken or not of this package, or ``model_fn`` makes
            another model.
    """
    content = _read(path)
    model = model_fn()
    if content.plan is not None:
        prune(model, content.plan, verify=False)
    try:
        _fit(model, content)
        model.load_state_dict(content.tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = lines[1] if len(lines) > 1 else lines[0]
        raise InputError(
            f"{os.fspath(path)!r} does not fit {type(model).__name__} of model_fn: {detail}"
        ) from error
    return model


# --- cutting -----------------------------------------------------------------------------------


@dataclass
class _Edit:
    """The changes to one module: its tensors with their new data, and its attributes."""

    module: nn.Module
    tensors: list[tuple[Tensor, Tensor]]
    attributes: dict[str, Any]

    def apply(self, undo: contextlib.ExitStack) -> None:
        """Make the changes; ``undo`` takes them back."""
        for tensor, small in self.tensors:
            # Undone in the opposite order: a gradient must have the shape of its tensor.
            undo.callback(setattr, tensor, "grad", tensor.grad)
            undo.callback(_set_data, tensor, tensor.data)
            tensor.grad = None
            _set_data(tensor, small)
        for name, value in self.attributes.items():
            undo.callback(setattr, self.module, name, getattr(self.module, name))
            setattr(self.module, name, value)


def _set_data(tensor: Tensor, data: Tensor) -> None:
    """``tensor.data = data`` for another shape, even while an old autograd graph is alive.

    Such a graph (that of a loss which is still in scope) keeps the accumulator of the tensor's
    gradient, which insists on the old shape; only a change of dtype makes torch drop it.
    """
    if tensor.requires_grad:
        other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
        tensor.data = data.new_empty(0, dtype=other)
    tensor.data = data


def _edit(path: str, module: nn.Module, cut: Cut) -> _Edit:
    tensors = [(tensor, small) for _, tensor, small in cut_tensors(path, module, cut)]
    return _Edit(module, tensors, cut_attributes(module, cut))


def _modules(model: nn.Module, plan: PruningPlan) -> dict[str, nn.Module]:
    """The modules that the plan names."""
    if fingerprint(model) != plan.fingerprint:
        raise InputError(
            f"the plan was made for a {plan.model} whose parameters have other names or shapes "
            f"than this {type(model).__name__} has (fingerprint {plan.fingerprint[:12]} is not "
            f"{fingerprint(model)[:12]})"
        )
    modules = dict(model.named_modules())
    missing = [path for path in plan.modules if path not in modules]
    if missing:
        raise InputError(f"{type(model).__name__} has no module {missing[0]!r}, the plan has")
    return {path: modules[path] for path in plan.modules}


def _plan_of(model: nn.Module) -> PruningPlan | None:
    return getattr(model, "ccp_plan", None)


# --- masking -----------------------------------------------------------------------------------


def _zero_removed(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, dim: int, removed: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        x = args[0].index_fill(dim, removed.to(args[0].device), 0)
        return (x, *args[1:]), kwargs
    x = kwargs["input"].index_fill(dim, removed.to(kwargs["input"].device), 0)
    return args, {**kwargs, "input": x}


def _input_dim(module: nn.Module) -> int:
    """The dimension of the input channels, counted from the end."""
    return -(module.weight.dim() - 1) if isinstance(module, CONVOLUTIONS) else -1


def _others(module: nn.Module, kept: tuple[int, ...]) -> Tensor:
    stays = set(kept)
    return torch.tensor([i for i in range(module.weight.shape[1]) if i not in stays])


# --- verification ------------------------------------------------------------------------------


class _Verification:
    """Compares the model as it is now, masked, with what it has become at :meth:`compare`."""

    def __init__(self, model: nn.Module, plan: PruningPlan) -> None:
        self._model = model
        self._inputs = _random_inputs(model, plan)
        shapes = ", ".join(str(tuple(x.shape)) for x in self._inputs)
        refusal = (
            f"prune: verification is not possible, nothing was changed: {type(model).__name__} "
            f"{{}} on random inputs of shape {shapes}; verify=False leaves it out"
        )
        with masked(model, plan):
            try:
                self._expected = self._run()
            except Exception as error:  # whatever the model's own code raises
                raise InputError(refusal.format(f"cannot be run ({_one_line(error)})")) from error
        values = [x for _, x in self._expected if x.numel()]
        if values and not any(x.isfinite().any() for x in values):
            raise InputError(refusal.format("has no finite output"))

    def compare(self) -> None:
        running: list[str] = []
        with _watched(self._model, running):
            try:
                found = self._run()
            except Exception as error:  # whatever the model's own code raises
                where = repr(running[-1]) if running and running[-1] else "the model itself"
                raise InputError(
                    f"prune: verification failed, nothing was changed: the pruned model raises "
                    f"in {where}: {_one_line(error)}"
                ) from error
        for (name, a), (_, b) in zip(self._expected, found, strict=True):
            _require_equal(name, a, b)

    def _run(self) -> list[tuple[str, Tensor]]:
        """The tensors that the model returns, by their place in the output."""
        model = self._model
        with (
            training_flags_kept(model),
            random_state_kept(model),
            _full_precision(),
            torch.no_grad(),
            _buffers_kept(model),
        ):
            model.eval()
            torch.manual_seed(0)
            output = model(*self._inputs)
        leaves = tree_leaves_with_path(output)
        return [(f"output{keystr(at)}", x) for at, x in leaves if isinstance(x, Tensor)]


def _random_inputs(model: nn.Module, plan: PruningPlan) -> list[Tensor]:
    floating = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for spec in plan.inputs:
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            x = torch.randn(spec.shape, generator=generator).to(floating.dtype)
        else:
            x = torch.randint(0, 2, spec.shape, generator=generator).to(dtype)
        inputs.append(x.to(floating.device))
    return inputs


def _require_equal(name: str, expected: Tensor, found: Tensor) -> None:
    failed = f"prune: verification failed, nothing was changed: {name} of the pruned model"
    if expected.shape != found.shape:
        raise InputError(
            f"{failed} has shape {tuple(found.shape)}, the masked model's {tuple(expected.shape)}"
        )
    wide = torch.promote_types(expected.dtype, torch.float64)
    a, b = expected.to(wide), found.to(wide)
    special = [x.masked_fill(x.isfinite(), 0) for x in (a, b)]
    if not torch.allclose(*special, rtol=0, atol=0, equal_nan=True):
        raise InputError(f"{failed} is NaN or infinite in other places than the masked model's")
    finite = a.isfinite()
    a, b = a[finite], b[finite]
    scale = a.abs().amax().item() if a.numel() else 0.0
    error = (a - b).abs().amax().item() if a.numel() else 0.0
    tolerance = _TOLERANCE.get(expected.dtype, 0.0) * scale
    if error > tolerance:
        raise InputError(
            f"{failed} differs from the masked model's by {error:.3g}; its values go up to "
            f"{scale:.3g}, and {tolerance:.3g} is allowed"
        )


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its own buffers back at the end, with the values that they have now."""
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in before:
            module._buffers[name] = buffer
            # Left alone where nothing changed, because an autograd graph may hold the buffer.
            if not torch.equal(buffer, value):
                buffer.copy_(value)


@contextlib.contextmanager
def _watched(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep in ``running`` the paths of the modules whose forward is under way."""

    def leave_module(*_: Any) -> None:
        running.pop()

    with contextlib.ExitStack() as stack:
        for path, module in model.named_modules():
            enter = module.register_forward_pre_hook(lambda *_, p=path: running.append(p))
            leave = module.register_forward_hook(leave_module)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        yield


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """float32 without TF32, whose rounding would hide a small error."""
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


# --- files -------------------------------------------------------------------------------------


@dataclass
class _Content:
    tensors: dict[str, Tensor]
    layouts: dict[str, list[int]]
    plan: PruningPlan | None


def _read(path: str | os.PathLike[str]) -> _Content:
    from safetensors import SafetensorError, safe_open

    source = os.fspath(path)
    if not Path(path).is_file():
        raise InputError(f"{source!r}: no such file")
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{source!r} is not a whole safetensors file: {error}") from error
    if _METADATA not in metadata:
        raise InputError(f"{source!r} was not written by ccp_ext.save")
    try:
        content = json.loads(metadata[_METADATA])
        version, plan = content["version"], content["plan"]
        for name, original in content["aliases"].items():
            tensors[name] = tensors[original]
        layouts = dict(content["layouts"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{source!r} has broken metadata: {error!r}") from error
    if version != _VERSION:
        raise InputError(f"{source!r} has version {version!r}; this ccp_ext reads {_VERSION}")
    if plan is not None:
        plan = PruningPlan.from_json(json.dumps(plan), f"plan in {source!r}")
    return _Content(tensors, layouts, plan)


def _fit(model: nn.Module, content: _Content) -> None:
    """Give the model's tensors the dtype and memory format of those in the file."""
    for name, target in model.state_dict(keep_vars=True).items():
        source = content.tensors.get(name)
        if isinstance(target, Tensor) and source is not None and source.shape == target.shape:
            layout = content.layouts.get(name, list(range(source.dim())))
            target.data = torch.empty_permuted(
                source.shape, layout, dtype=source.dtype, device=target.device
            )


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are the same memory as an earlier one, with the earlier name."""
    first: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, tensor in state.items():
        if tensor.numel() == 0:
            continue
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if key in first:
            aliases[name] = first[key]
        first.setdefault(key, name)
    return aliases


def _layout(tensor: Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest in memory."""
    return sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))
