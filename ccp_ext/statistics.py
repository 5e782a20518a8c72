"""One pass over the data fills (u, S) of every channel group.

For a channel's tensor z (bias-free), <w_i, dl_n/dw_i> = sum over positions of z_ni * dl_n/dz_ni:
one fused multiply-reduce (:func:`ccp_ext.ops.channel_dot`) over an activation and its gradient
replaces the per-sample weight gradients, and one weighted Gram update
(:func:`ccp_ext.ops.weighted_grams_`, all groups at once) a batch adds them to S.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ccp_ext import ops
from ccp_ext.cost import Cost
from ccp_ext.curvature import BackwardPass, BatchObjective, Curvature, check_choice
from ccp_ext.eager import eager
from ccp_ext.errors import InputError
from ccp_ext.graph import Tap
from ccp_ext.observation import Observer

if TYPE_CHECKING:
    from ccp_ext.graph import ChannelGraph, Group

SITES = ("gate", "weight")


@dataclass
class GroupStatistics:
    """Sums over the samples seen so far for one group of C channels, and the means they give."""

    first_order: bool
    channels: int | None = None  # None until a tensor was seen
    count: int = 0
    gram_sum: Tensor | None = None  # [C, C]
    gradient_sum: Tensor | None = None  # [C]
    absolute_sum: Tensor | None = None  # [C]
    row_blocks: list[Tensor] | None = None  # [n, C], or [n, 1] of zeros; None: not kept

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

    @property
    def rows(self) -> Tensor:
        """The weighted derivatives Q [M, C], rows sqrt(sigma_nk) a_nk, so that S = Q'Q / count.

        Row by row the same sample and the same k in every group of the collector.
        """
        if self.row_blocks is None:
            raise RuntimeError(
                "statistics: the rows were not kept; pass keep_rows=True to `collect`"
            )
        self._mean(self.gram_sum)  # raises if no sample was seen
        return self._joined_rows()

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
        if backward_pass.first_order and self.first_order:
            self.gradient_sum += a.sum(0)
            self.absolute_sum += a.abs().sum(0)

    def _keep(self, a: Tensor, sigma: Tensor | None) -> None:
        """Keep the derivatives ``a`` [N, C] of one backward pass as rows of Q."""
        self.row_blocks.append(a if sigma is None else a * sigma.to(a).sqrt().unsqueeze(1))

    def _joined_rows(self) -> Tensor:
        # Joined for good, so that the blocks and their union are not both held.
        if len(self.row_blocks) != 1 or self.row_blocks[0].shape[1] != self.channels:
            blocks = [block.expand(-1, self.channels) for block in self.row_blocks]
            self.row_blocks = [torch.cat([self.gram_sum.new_zeros(0, self.channels), *blocks])]
        return self.row_blocks[0]

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


class Statistics(Mapping):
    """Collects (u, S) for every group while the user runs forward and backward; see `collect`.

    A mapping from group name (or group) to :class:`GroupStatistics`; it can be read inside and
    after the ``with`` block.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Mapping[str, Sequence[Tap]],
        *,
        site: str,
        curvature: Curvature,
        seed: int,
        parameter_gradients: bool,
        channels: Mapping[str, int] | None = None,
        keep_rows: bool = False,
    ) -> None:
        self.model = model
        self.site = site
        self.curvature = curvature
        self.keep_rows = keep_rows
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._groups = {
            name: GroupStatistics(
                curvature.first_order,
                (channels or {}).get(name),
                row_blocks=[] if keep_rows else None,
            )
            for name in taps
        }
        self._incomplete = False  # a backward pass failed when part of its batch was added
        self._pass: _Pass | None = None  # of the forward pass now running, or the last one
        self._waiting: list[_Pass] = []  # passes with derivatives not yet in the sums
        self._observer = Observer(
            model,
            taps,
            of_filter=site == "weight",
            freeze=not parameter_gradients,
            begin=self._begin_pass,
            deliver=self._receive,
        )

    def __enter__(self) -> Statistics:
        self._observer.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._observer.__exit__()
        if exception[0] is None and not self._incomplete:
            self._flush()
        self._waiting = []

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

    def rows(self) -> dict[str, Tensor]:
        """The kept rows [M, C] of every group, by name; see :attr:`GroupStatistics.rows`."""
        return {name: self[name].rows for name in self}

    def settings(self) -> dict[str, Any]:
        """The options that decide what the numbers mean, as plain values."""
        return {"site": self.site, **self.curvature.settings()}

    # --- what the observer calls ---------------------------------------------------------------

    def _begin_pass(self) -> _Pass:
        self._flush()
        self._pass = _Pass(self.curvature.users_backward)
        return self._pass

    def _receive(self, forward: _Pass, group: str, a: Tensor) -> None:
        """Keep the derivatives [N, C]; those of coupled channels and shared modules add up."""
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
        earlier = forward.contributions.get(group)
        forward.contributions[group] = a if earlier is None else earlier + a
        if not any(waiting is forward for waiting in self._waiting):
            self._waiting.append(forward)

    def _flush(self, finished: bool = True) -> None:
        """Add what the backward passes delivered to the sums.

        A sample counts for every group: one that its loss did not reach has derivative zero.
        """
        if self._incomplete:
            raise RuntimeError(
                "statistics: a backward pass failed after a part of its batch was added; collect "
                "again, or go on from a state_dict"
            )
        for forward in self._waiting:
            for name, a in forward.contributions.items():
                self._groups[name]._add(a, forward.backward_pass)
            if forward.backward_pass.gram:
                self._add_grams(forward.contributions, forward.backward_pass.sigma)
                if self.keep_rows:
                    self._keep_rows(forward)
            if forward.backward_pass.counts:
                self._count(next(iter(forward.contributions.values())))
            forward.contributions = {}
            forward.finished = finished
        self._waiting = []

    def _add_grams(self, contributions: Mapping[str, Tensor], sigma: Tensor | None) -> None:
        """One call for all groups whose derivatives share device and dtype: commonly all."""
        alike: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        for name, a in contributions.items():
            alike.setdefault((a.device, a.dtype), []).append(name)
        for names in alike.values():
            sums = [self._groups[name].gram_sum for name in names]
            ops.weighted_grams_(sums, [contributions[name] for name in names], sigma)

    def _keep_rows(self, forward: _Pass) -> None:
        """One block of rows in every group, so that row m of all groups is the same sample's."""
        zeros = next(iter(forward.contributions.values())).new_zeros(1, 1)
        samples = len(next(iter(forward.contributions.values())))
        for name, group in self._groups.items():
            a = forward.contributions.get(name, zeros.expand(samples, 1))
            group._keep(a, forward.backward_pass.sigma)

    def _count(self, a: Tensor) -> None:
        for group in self._groups.values():
            group.count += len(a)
            if group.gram_sum is None and group.channels is not None:
                group._allocate(a.new_zeros(1, group.channels))

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
        if not outputs.requires_grad:
            raise InputError(
                "stats.backward: outputs carry no gradient; hand on what the model returned, not "
                "detached and not under no_grad"
            )
        objective = BatchObjective(self.curvature, outputs.detach(), targets, self._generator)
        passes = list(objective.passes())
        for k, backward_pass in enumerate(passes):
            forward.backward_pass = backward_pass
            last = k + 1 == len(passes)
            seed = backward_pass.seed().to(outputs.dtype)
            try:
                torch.autograd.backward(outputs, seed, retain_graph=not last)
            except BaseException:
                self._waiting, forward.finished = [], True
                self._incomplete = k > 0
                raise
            self._flush(finished=last)
        forward.finished = True
        return objective.loss

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if distributed else 0
            self._generators[device] = torch.Generator(device).manual_seed(self._seed + rank)
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
        if self.keep_rows != other.keep_rows:
            raise InputError(
                "Statistics.merge: both collectors or none must keep rows, got keep_rows="
                f"{self.keep_rows} and {other.keep_rows}"
            )
        for name, mine in self._groups.items():
            theirs = other._groups[name]
            if self.keep_rows:
                mine.row_blocks += theirs.row_blocks
            if theirs.gram_sum is None:
                continue
            if mine.gram_sum is None:
                mine._allocate(theirs.gram_sum)
            for total, part in zip(mine._sums(), theirs._sums(), strict=True):
                total += part.to(total)
            mine.count += theirs.count
        return self

    def all_reduce(self, process_group: Any = None) -> Statistics:
        """Add up the sums of all ranks of ``torch.distributed``; a rank may have seen no sample.

        Three messages for all groups together: their widths, their counts, and their sums one after
        another, of which a copy is made for that time. Kept rows are gathered: every rank then
        holds those of all ranks, in the ranks' order.

        Raises:
            InputError: this rank's sums lie on several devices; it has sent nothing then, and
                the other ranks wait for it until their process group's timeout.
        """
        self._flush()
        device = self._one_device()
        reduce = partial(torch.distributed.all_reduce, group=process_group)
        groups = list(self._groups.values())
        parameter = next(self.model.parameters())
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        seen = [0 if group.gram_sum is None else len(group.gram_sum) for group in groups]
        widths = torch.tensor(seen, device=device)
        reduce(widths, torch.distributed.ReduceOp.MAX)
        for group, width in zip(groups, widths.tolist(), strict=True):
            if width and group.gram_sum is None:
                group._allocate(torch.zeros(1, width, dtype=dtype, device=device))
        groups = [group for group in groups if group.gram_sum is not None]
        if not groups:
            return self
        counts = torch.tensor([group.count for group in groups], device=device)
        sums = [total for group in groups for total in group._sums()]
        joined = torch.cat([total.flatten() for total in sums])
        reduce(counts)
        reduce(joined)
        for total, part in zip(sums, joined.split([t.numel() for t in sums]), strict=True):
            total.copy_(part.view_as(total))
        for group, count in zip(groups, counts.tolist(), strict=True):
            group.count = count
            if self.keep_rows:
                group.row_blocks = _all_gather_rows(group._joined_rows(), process_group)
        return self

    def _one_device(self) -> torch.device:
        """That of the sums; the model's if there are none yet."""
        devices = {g.gram_sum.device for g in self._groups.values() if g.gram_sum is not None}
        if len(devices) > 1:
            raise InputError(
                "Statistics.all_reduce: the sums of a rank must lie on one device, got "
                f"{', '.join(sorted(map(str, devices)))}; collect with the model on one device, or "
                "load the state_dict into a collector of such a model"
            )
        return next(iter(devices), next(self.model.parameters()).device)

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, as plain tensors and values (readable with ``weights_only=True``)."""
        self._flush()
        return {
            "settings": self.settings(),
            "groups": {
                name: {
                    "count": g.count,
                    "sums": None if g.gram_sum is None else g._sums(),
                    "rows": g.row_blocks,
                }
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
        if any(
            (saved.get("rows") is not None) != self.keep_rows for saved in state["groups"].values()
        ):
            raise InputError(
                f"Statistics.load_state_dict: keep_rows={self.keep_rows} here, and the state was "
                f"collected with keep_rows={not self.keep_rows}"
            )
        self._waiting, self._incomplete = [], False
        device = next(self.model.parameters()).device
        for name, saved in state["groups"].items():
            group = self._groups[name]
            group.count = saved["count"]
            if saved["sums"] is not None:
                group.gram_sum, group.gradient_sum, group.absolute_sum = (
                    t.to(device, copy=True) for t in saved["sums"]
                )
                group.channels = len(group.gram_sum)
            if self.keep_rows:
                group.row_blocks = [block.to(device) for block in saved["rows"]]
        for kind, generator in state["generators"].items():
            if kind == str(device):
                self._generator(device).set_state(generator)


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
    keep_rows: bool = False,
) -> Statistics:
    """Observe a model's channels while forward and backward passes run; use it with ``with``.

    ::

        with collect(model, graph, site="gate", curvature="logits") as stats:
            for x, y in loader:
                stats.backward(model(x), y)
        stats[group].u, stats[group].S, stats[group].s_hat()

    Inside the block every BatchNorm is in eval mode (batch statistics would mix the samples, and
    under them the loss does not depend on the scale of a filter), and parameters do not require
    gradients, which spares their computation; both are put back afterwards. Dropout follows the
    model's own mode. Autocast works: the statistics are float32 (float64 for a float64 model)
    whatever the activations are. A model that overwrites an observed tensor (an in-place ReLU
    behind it) runs forward twice in the first batch, and such tensors are copied from then on.

    Args:
        model: the network; the same object (or one with the same module paths) as was traced, or
            what ``torch.compile`` made of it.
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
        seed: of the labels and projections drawn; under torch.distributed the rank is added.
        parameter_gradients: leave parameters as they are, so that the user's backward pass fills
            ``.grad`` too (only with "empirical").
        keep_rows: also keep every weighted derivative sqrt(sigma_nk) a_nk, from which
            :func:`ccp_ext.refine` sees the curvature between groups: 4 bytes (8 for a float64
            model) for each channel of every group and each row of S (samples, times ``rows``, times
            classes for "exact" soft labels), on the model's device. 10,000 samples of 26,000
            channels are 1 GB; :meth:`Statistics.state_dict` holds them too.

    Raises:
        InputError: an unknown option value, module path or tensor, a BatchNorm without running
            statistics.
    """
    check_choice("site", site, SITES)
    if parameter_gradients and curvature != "empirical":
        raise InputError(
            "collect: parameter_gradients=True needs curvature='empirical', "
            f"got curvature={curvature!r}, whose backward passes are not the loss's"
        )
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError(f"collect: seed must be an integer from 0 to 2**63 - 1, got {seed!r}")
    model = eager(model)
    taps = _resolve_taps(graph, site)
    if not taps:
        raise InputError("collect: the graph has no groups, so there is nothing to observe")
    # The empirical row is the loss's gradient, so u comes with it at no cost.
    first_order = first_order or curvature == "empirical"
    return Statistics(
        model,
        taps,
        site=site,
        curvature=Curvature(curvature, loss, first_order, rows, temperature),
        seed=seed,
        parameter_gradients=parameter_gradients,
        channels={} if isinstance(graph, Mapping) else {g.name: g.channels for g in graph.groups},
        keep_rows=keep_rows,
    )


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


def _all_gather_rows(rows: Tensor, process_group: Any) -> list[Tensor]:
    """The rows [M, C] of every rank; backends want equal shapes, so shorter ones are padded."""
    ranks = torch.distributed.get_world_size(process_group)
    lengths = [torch.tensor([0], device=rows.device) for _ in range(ranks)]
    mine = torch.tensor([len(rows)], device=rows.device)
    torch.distributed.all_gather(lengths, mine, group=process_group)
    longest = max(int(length) for length in lengths)
    padded = [rows.new_empty(longest, rows.shape[1]) for _ in range(ranks)]
    own = torch.cat([rows, rows.new_zeros(longest - len(rows), rows.shape[1])])
    torch.distributed.all_gather(padded, own, group=process_group)
    return [part[: int(length)] for part, length in zip(padded, lengths, strict=True)]
