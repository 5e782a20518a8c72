"""One pass over the data fills (u, S) of every channel group.

For a channel's tensor z (bias-free), <w_i, dl_n/dw_i> = sum over positions of z_ni * dl_n/dz_ni:
one fused multiply-reduce (:func:`ccp_ext.ops.channel_dot`) over an activation and its gradient
replaces the per-sample weight gradients, and one weighted Gram update
(:func:`ccp_ext.ops.weighted_gram_`) a batch adds them to S.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ccp_ext import ops
from ccp_ext.cost import Cost
from ccp_ext.curvature import BackwardPass, BatchObjective, Curvature, check_choice
from ccp_ext.errors import InputError
from ccp_ext.graph import Tap

if TYPE_CHECKING:
    from ccp_ext.graph import ChannelGraph, Group

SITES = ("gate", "weight")


@dataclass
class GroupStatistics:
    """Sums over the samples seen so far for one group of C channels, and the means they give."""

    channels: int
    first_order: bool
    count: int = 0
    gram_sum: Tensor | None = None  # [C, C]
    gradient_sum: Tensor | None = None  # [C]
    absolute_sum: Tensor | None = None  # [C]

    @property
    def S(self) -> Tensor:
        """Pairwise curvature [C, C], (1/N) sum_nk sigma_nk a_nk a_nk'; symmetric to the bit."""
        return self._mean(self.gram_sum)

    @property
    def u(self) -> Tensor:
        """Mean first-order term [C], (1/N) sum_n a_n with a_n the derivative of the n-th loss."""
        return self._mean(self._first_order(self.gradient_sum))

    @property
    def absolute(self) -> Tensor:
        """Mean absolute first-order term [C], (1/N) sum_n |a_n| (Taylor, Molchanov et al. 2017)."""
        return self._mean(self._first_order(self.absolute_sum))

    def s_hat(self) -> Tensor:
        """The paper's matrix [C, C] of min b'S_hat b over KEPT masks b (Peng et al., ICML 2019).

        S_hat_ij = s_ij / 2 off the diagonal and S_hat_ii = s_ii / 2 + u_i - sum_j s_ij, so that
        b'S_hat b = cost(1 - b) - cost(1) for every binary b.
        """
        s = self.S
        return 0.5 * s + torch.diag(self.u - s.sum(1))

    def cost(self, first_order: bool = False) -> Cost:
        """The quadratic cost of removing channels: S alone, or with the linear term u."""
        return Cost(self.S, self.u if first_order else None)

    def _mean(self, total: Tensor | None) -> Tensor:
        if self.count == 0 or total is None:
            raise RuntimeError(
                "statistics: no sample seen; run a forward and a backward pass inside `collect`"
            )
        return total / self.count

    def _first_order(self, total: Tensor | None) -> Tensor | None:
        if not self.first_order:
            raise RuntimeError(
                "statistics: u was not collected; pass first_order=True to `collect`"
            )
        return total

    def _add(self, a: Tensor, backward_pass: BackwardPass) -> None:
        """Add the derivatives ``a`` [N, C] of one backward pass."""
        if self.gram_sum is None:
            self._allocate(a)
        if backward_pass.gram:
            ops.weighted_gram_(self.gram_sum, a, backward_pass.sigma)
        if backward_pass.first_order and self.first_order:
            self.gradient_sum += a.sum(0)
            self.absolute_sum += a.abs().sum(0)
        if backward_pass.counts:
            self.count += len(a)

    def _allocate(self, like: Tensor) -> None:
        self.channels = like.shape[-1]
        self.gram_sum = like.new_zeros(self.channels, self.channels)
        self.gradient_sum = like.new_zeros(self.channels)
        self.absolute_sum = like.new_zeros(self.channels)

    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gram_sum, self.gradient_sum, self.absolute_sum


@dataclass
class _Pass:
    """One forward pass: the derivatives of each group that its backward passes deliver."""

    backward_pass: BackwardPass | None
    contributions: dict[str, Tensor] = field(default_factory=dict)  # group -> [N, C]
    finished: bool = False


@dataclass
class _Source:
    """A tensor to observe, and the groups whose channels it carries."""

    module: nn.Module
    tap: Tap
    subtract_bias: bool
    readers: list[tuple[str, Tensor | None]] = field(default_factory=list)
    copy: bool = False  # someone changes the tensor in place after we saw it


class _RequireGradient(torch.autograd.Function):
    """Make a tensor part of the autograd graph in place, without a copy.

    Unlike ``requires_grad_()`` this leaves a non-leaf, on which in-place operators still work.
    """

    @staticmethod
    def forward(ctx, tensor: Tensor, anchor: Tensor) -> Tensor:  # noqa: ARG004
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:  # noqa: ARG004
        return None, None


class Statistics(Mapping):
    """Collects (u, S) for every group while the user runs forward and backward; see `collect`.

    A mapping from group name (or group) to :class:`GroupStatistics`; it can be read inside and
    after the ``with`` block.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph | Mapping[str, str | Tap | Sequence[str | Tap]],
        *,
        site: str = "gate",
        curvature: str = "logits",
        loss: str = "cross_entropy",
        first_order: bool = True,
        rows: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
        parameter_gradients: bool = False,
    ) -> None:
        check_choice("site", site, SITES)
        # The empirical row is the loss's gradient, so u comes with it at no cost.
        first_order = first_order or curvature == "empirical"
        self.curvature = Curvature(curvature, loss, first_order, rows, temperature)
        if parameter_gradients and curvature != "empirical":
            raise InputError(
                "collect: parameter_gradients=True needs curvature='empirical', "
                f"got curvature={curvature!r}, whose backward passes are not the loss's"
            )
        self.model = model
        self.site = site
        self.parameter_gradients = parameter_gradients
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._anchor = torch.zeros((), requires_grad=True)
        taps = _resolve_taps(graph, site)
        self._sources = _sources(model, taps, site)
        self._groups = {name: GroupStatistics(_channels(graph, name), first_order) for name in taps}
        self._exit = contextlib.ExitStack()
        self._pass: _Pass | None = None  # of the forward pass now running, or the last one
        self._waiting: list[_Pass] = []  # passes with derivatives not yet in the sums
        self._seen: list[tuple[_Source, Tensor, int]] = []  # tensors observed in this forward
        self._rerunning = False

    # --- reading -------------------------------------------------------------------------------

    def __getitem__(self, group: str | Group) -> GroupStatistics:
        self._flush()
        return self._groups[getattr(group, "name", group)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def costs(self, first_order: bool = False) -> dict[str, Cost]:
        """The quadratic cost of every group, by name."""
        return {name: self[name].cost(first_order) for name in self}

    def settings(self) -> dict[str, Any]:
        """The options that decide what the numbers mean, as plain values."""
        return {"site": self.site, **self.curvature.settings()}

    # --- hooking -------------------------------------------------------------------------------

    def __enter__(self) -> Statistics:
        with contextlib.ExitStack() as stack:
            _batchnorm_in_eval_mode(self.model, stack)
            if not self.parameter_gradients:
                _freeze_parameters(self.model, stack)
            handles = [
                self.model.register_forward_pre_hook(self._before_forward),
                self.model.register_forward_hook(self._after_forward, with_kwargs=True),
                *(self._observe(source) for source in self._sources),
            ]
            for handle in handles:
                stack.callback(handle.remove)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()
        if exception[0] is None:
            self._flush()

    def _observe(self, source: _Source) -> torch.utils.hooks.RemovableHandle:
        if source.tap.port == "input":
            return source.module.register_forward_pre_hook(
                lambda module, args: self._watch(source, args[0])
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
        self._flush()
        self._begin_pass()

    def _begin_pass(self) -> None:
        self._pass = _Pass(self.curvature.users_backward)
        self._seen = []

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Run the forward pass again, with copies, if someone overwrote what we must remember.

        That happens in the first batch only: from then on these tensors are copied when seen.
        """
        overwritten = [s for s, tensor, version in self._seen if tensor._version != version]
        self._seen = []
        if not overwritten or self._rerunning:
            return None
        for source in overwritten:
            source.copy = True
        self._rerunning = True
        try:
            self._begin_pass()
            return module.forward(*args, **kwargs)
        finally:
            self._rerunning = False
            self._seen = []

    def _watch(self, source: _Source, tensor: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        if not isinstance(tensor, Tensor):
            raise InputError(
                f"collect: the {source.tap.port} of module {source.tap.module!r} must be a tensor, "
                f"got {type(tensor).__name__}"
            )
        if not tensor.requires_grad:
            _RequireGradient.apply(tensor, self._anchor)
        if self._pass is None:  # a part of the model was called by itself
            self._begin_pass()
        values = tensor.detach()
        if source.copy:
            values = values.clone()
        else:
            self._seen.append((source, values, values._version))
        # `values` shares the version counter, so a change in place shows when the gradient comes.
        tensor.register_hook(partial(self._receive, source, self._pass, values, values._version))

    def _receive(
        self, source: _Source, forward: _Pass, values: Tensor, version: int, gradient: Tensor
    ) -> None:
        """Turn a tensor and its gradient into per-sample derivatives along each channel."""
        if forward.backward_pass is None:
            raise RuntimeError(
                f"collect: curvature={self.curvature.kind!r} has its own backward passes; call "
                "stats.backward(outputs, targets) instead of loss.backward()"
            )
        if forward.finished:
            raise RuntimeError(
                "collect: a backward pass came after its batch was already added to the sums; run "
                "all backward passes of a batch before the next forward pass"
            )
        if values._version != version:
            raise RuntimeError(
                f"collect: the {source.tap.port} of module {source.tap.module!r} was changed in "
                "place after it was observed; call the whole model, not its parts"
            )
        a = ops.channel_dot(values, gradient, source.tap.channel_dim)
        if source.subtract_bias:
            a = a - source.module.bias.detach().to(a.dtype) * _channel_sum(
                gradient, source.tap.channel_dim, a.dtype
            )
        for name, index in source.readers:
            part = a if index is None else a.index_select(1, index.to(a.device))
            earlier = forward.contributions.get(name)
            forward.contributions[name] = part if earlier is None else earlier + part
        if not any(waiting is forward for waiting in self._waiting):
            self._waiting.append(forward)

    def _flush(self, finished: bool = True) -> None:
        """Add what the backward passes delivered to the sums."""
        for forward in self._waiting:
            for name, a in forward.contributions.items():
                self._groups[name]._add(a, forward.backward_pass)
            forward.contributions = {}
            forward.finished = finished
        self._waiting = []

    # --- the curvature's own backward ----------------------------------------------------------

    def backward(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Back-propagate what the curvature asks for, and add this batch to the statistics.

        Args:
            outputs: the model's outputs [N, K] (or [N, K, ...] for `logits` and for hard labels):
                logits for ``loss="cross_entropy"``, predictions for ``"least_squares"``.
            targets: class indices int64 [N] (or [N, ...]) or probabilities [N, K]; values [N, K]
                for least squares. May be None for `logits` and `sampled` when
                ``first_order=False``.

        Returns:
            The summed loss of the batch (nats for cross-entropy), detached; NaN without targets.

        Raises:
            InputError: targets of the wrong shape, dtype or range.
        """
        self._flush()
        forward = self._pass
        if forward is None or forward.finished:
            raise RuntimeError(
                "stats.backward: run the model's forward pass inside `collect` first, once for "
                "each call"
            )
        if not isinstance(outputs, Tensor):
            raise InputError(
                f"stats.backward: outputs must be a tensor, got {type(outputs).__name__}"
            )
        objective = BatchObjective(self.curvature, outputs.detach(), targets, self._generator)
        passes = list(objective.passes())
        for k, backward_pass in enumerate(passes):
            forward.backward_pass = backward_pass
            last = k + 1 == len(passes)
            seed = backward_pass.seed().to(outputs.dtype)
            torch.autograd.backward(outputs, seed, retain_graph=not last)
            self._flush(finished=last)
        forward.finished = True
        return objective.loss

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    # --- combining -----------------------------------------------------------------------------

    def merge(self, other: Statistics) -> Statistics:
        """Add another collector's sums (same groups and settings) to this one's; returns self."""
        self._flush()
        other._flush()
        if self.settings() != other.settings() or list(self) != list(other):
            raise InputError(
                "Statistics.merge: both collectors must have the same groups and settings, got "
                f"{self.settings()} and {other.settings()}"
            )
        for name, mine in self._groups.items():
            theirs = other._groups[name]
            if theirs.gram_sum is None:
                continue
            if mine.gram_sum is None:
                mine._allocate(theirs.gram_sum)
            for total, part in zip(mine._sums(), theirs._sums(), strict=True):
                total += part.to(total)
            mine.count += theirs.count
        return self

    def all_reduce(self, process_group: Any = None) -> Statistics:
        """Add up the sums of all ranks of ``torch.distributed``; a rank may have seen no sample."""
        self._flush()
        like = next(self.model.parameters())
        for group in self._groups.values():
            if group.gram_sum is None:
                group._allocate(like.new_zeros(1, group.channels, dtype=_statistics_dtype(like)))
            count = torch.tensor([group.count], device=group.gram_sum.device)
            for total in (*group._sums(), count):
                torch.distributed.all_reduce(total, group=process_group)
            group.count = int(count)
        return self

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, as plain tensors and values (readable with ``weights_only=True``)."""
        self._flush()
        return {
            "settings": self.settings(),
            "groups": {
                name: {"count": g.count, "sums": None if g.gram_sum is None else g._sums()}
                for name, g in self._groups.items()
            },
            "generators": {str(d): g.get_state() for d, g in self._generators.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict` of a collector with the same groups and settings."""
        if state["settings"] != self.settings() or list(state["groups"]) != list(self):
            raise InputError(
                "Statistics.load_state_dict: the state belongs to other groups or settings: "
                f"{state['settings']}, here {self.settings()}"
            )
        self._waiting = []
        for name, saved in state["groups"].items():
            group = self._groups[name]
            group.count = saved["count"]
            if saved["sums"] is not None:
                group.gram_sum, group.gradient_sum, group.absolute_sum = (
                    t.clone() for t in saved["sums"]
                )
        for device, generator in state["generators"].items():
            self._generator(torch.device(device)).set_state(generator)


def collect(
    model: nn.Module,
    graph: ChannelGraph | Mapping[str, str | Tap | Sequence[str | Tap]],
    *,
    site: str = "gate",
    curvature: str = "logits",
    loss: str = "cross_entropy",
    first_order: bool = True,
    rows: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    parameter_gradients: bool = False,
) -> Statistics:
    """Observe a model's channels while forward and backward passes run; use it with ``with``.

    ::

        with collect(model, graph, site="gate", curvature="logits") as stats:
            for x, y in loader:
                stats.backward(model(x), y)
        stats[group].u, stats[group].S, stats[group].s_hat()

    Inside the block every BatchNorm is in eval mode (batch statistics would mix the samples, and
    under them the loss does not depend on the scale of a filter), and parameters do not require
    gradients, which spares their computation; both are put back afterwards. Autocast works: the
    statistics are float32 (float64 for a float64 model) whatever the activations are.

    Args:
        model: the network; the same object (or one with the same module paths) as was traced.
        graph: a :class:`ccp_ext.graph.ChannelGraph`, or a mapping from any name to the modules
            (paths or :class:`ccp_ext.graph.Tap`) whose output channels live and die together;
            their derivatives add up before the product.
        site: where a channel's derivative is taken: "gate", the tensor after normalisation and
            activation, which is what surgery removes; or "weight", the paper's <w_i, dl/dw_i> of
            the filter without its bias. For a mapping it only decides about the bias.
        curvature: which rows a_nk and weights sigma_nk make S = (1/N) sum_n sum_k sigma a a':

            - "empirical": the gradient of each sample's loss. For one-hot labels this IS the
              paper's J'Sigma J with Sigma = diag(y / (f * f)) (Peng et al., ICML 2019). The
              user's own ``loss.backward()`` of a SUMMED loss works too.
            - "exact": one row a class, J'Sigma J for soft labels, J'J for least squares. Class
              indices need a single row.
            - "sampled": labels drawn from the model's softmax (true Fisher, unbiased).
            - "logits": random +-1 projections of the logits' Jacobian, an unbiased J'J of the
              logits (least squares on the logits).
        loss: "cross_entropy" (-sum_k y_k log f_k, f the softmax of the outputs) or
            "least_squares" (1/2 sum_k (y_k - f_k)^2, f the outputs).
        first_order: also collect u, which costs one more backward pass a batch unless the
            curvature's row is the loss's gradient already.
        rows: labels or projections drawn per sample (for "sampled" and "logits").
        temperature: divides the logits before the softmax of "sampled".
        seed: of the labels and projections drawn.
        parameter_gradients: leave parameters as they are, so that the user's backward pass fills
            ``.grad`` too (only with "empirical").

    Raises:
        InputError: an unknown option value, module path or tensor, a BatchNorm without running
            statistics.
    """
    return Statistics(
        model,
        graph,
        site=site,
        curvature=curvature,
        loss=loss,
        first_order=first_order,
        rows=rows,
        temperature=temperature,
        seed=seed,
        parameter_gradients=parameter_gradients,
    )


# --- taps and hooks ----------------------------------------------------------------------------


def _resolve_taps(graph: Any, site: str) -> dict[str, tuple[Tap, ...]]:
    if not isinstance(graph, Mapping):
        return {
            group.name: group.gate_taps if site == "gate" else group.weight_taps
            for group in graph.groups
        }
    taps = {}
    for name, entry in graph.items():
        entries = [entry] if isinstance(entry, str | Tap) else list(entry)
        taps[name] = tuple(e if isinstance(e, Tap) else Tap(e) for e in entries)
    return taps


def _sources(model: nn.Module, taps: Mapping[str, tuple[Tap, ...]], site: str) -> list[_Source]:
    """One source a tensor, though several groups may read channels of it."""
    modules = dict(model.named_modules())
    found: dict[tuple[str, str, int], _Source] = {}
    for name, group_taps in taps.items():
        for tap in group_taps:
            module = modules.get(tap.module)
            if module is None:
                raise InputError(
                    f"collect: the model has no module {tap.module!r} (group {name!r})"
                )
            key = (tap.module, tap.port, tap.channel_dim)
            biased = site == "weight" and tap.port == "output"
            if key not in found:
                has_bias = getattr(module, "bias", None) is not None
                is_filter = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
                found[key] = _Source(module, tap, biased and has_bias and is_filter)
            index = None if tap.index is None else torch.tensor(tap.index)
            found[key].readers.append((name, index))
    return list(found.values())


def _channels(graph: Any, name: str) -> int:
    """Known from a graph; for a mapping of modules only once a tensor was seen."""
    return (
        0
        if isinstance(graph, Mapping)
        else next(g.channels for g in graph.groups if g.name == name)
    )


def _channel_sum(tensor: Tensor, channel_dim: int, dtype: torch.dtype) -> Tensor:
    positions = [d for d in range(1, tensor.dim()) if d != channel_dim % tensor.dim()]
    return tensor.sum(positions, dtype=dtype) if positions else tensor.to(dtype)


def _batchnorms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield name, module


def _batchnorm_in_eval_mode(model: nn.Module, stack: contextlib.ExitStack) -> None:
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


def _statistics_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
