"""CCP with auxiliary classifiers."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ccp_ext.auxiliary import AuxiliaryHeads, train_heads
from ccp_ext.cost import Cost
from ccp_ext.criteria.base import register
from ccp_ext.criteria.ccp import SecondOrder
from ccp_ext.criteria.gradients import gradients_only_of
from ccp_ext.errors import InputError
from ccp_ext.graph import ChannelGraph
from ccp_ext.statistics import collect


class StatisticsWithHeads:
    """Collects the statistics of the network's loss and of its auxiliary heads' together.

    Args:
        options: of :func:`ccp_ext.collect`.
        count: of heads.
        seed: of their weights and of their training.

    Attributes:
        statistics: of :func:`ccp_ext.collect`.
        heads: once they are trained.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        options: dict[str, Any],
        count: int,
        seed: int,
    ) -> None:
        self.model, self.graph, self.count, self.seed = model, graph, count, seed
        self.statistics = collect(model, graph, **options)
        self._curvature = options["curvature"]
        self.heads: AuxiliaryHeads | None = None
        self._exit = contextlib.ExitStack()

    def prepare(self, images, *, batch_size: int, progress: bool) -> None:
        """Train the heads."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.heads = AuxiliaryHeads.spread(
                self.model, self.graph, images.num_classes, count=self.count
            )
        train_heads(
            self.model,
            self.heads,
            images,
            batch_size=batch_size,
            seed=self.seed,
            progress=progress,
        )

    def __enter__(self) -> StatisticsWithHeads:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.statistics)
            stack.enter_context(gradients_only_of((), self.heads))
            stack.enter_context(self.heads.attached(self.model))
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.__exit__(*exception)

    def update(self, x: Tensor, y: Tensor) -> None:
        outputs = [self.model(x), *self.heads()]
        if self._curvature == "logits":
            # J'J of all logits side by side is the sum of the heads' J'J.
            self.statistics.backward(torch.cat(outputs, 1))
        else:
            sum(cross_entropy(logits, y, reduction="sum") for logits in outputs).backward()


@register
class CCPAuxiliary(SecondOrder):
    name = "ccp-ac"
    source = "Peng et al., ICML 2019 (CCP-AC); heads of Zhuang et al., NeurIPS 2018 (DCP)"
    summary = "ccp with the curvature of three auxiliary classifiers added"
    note = (
        "the construction is DCP's, since only the name is known: three heads at equal distances, "
        "weight 1, trained on the images of the statistics while the network stays as it is; "
        "curvature 'logits' or 'empirical'; fine-tuning has three new ones on the pruned and "
        "repaired network, trained first while it stays as it is"
    )
    auxiliary_heads = 3
    site, curvature, first_order = "gate", "logits", False
    allocation = "optimal"

    def statistics(self) -> None:
        """None: the pass is the observation's."""

    def observation(self, model, graph) -> StatisticsWithHeads:
        settings = super().statistics()
        if settings["curvature"] not in ("logits", "empirical"):
            raise InputError(
                "criterion 'ccp-ac' takes curvature logits or empirical, got "
                f"{settings['curvature']!r}"
            )
        if settings["curvature"] == "logits" and settings["first_order"]:
            raise InputError(
                "criterion 'ccp-ac' takes first_order=True only with curvature='empirical'"
            )
        heads, seed = self.auxiliary_heads, self.options.seed
        return StatisticsWithHeads(model, graph, settings, heads, seed)

    def costs(self, model, graph, data) -> dict[str, Cost]:
        return super().costs(model, graph, data.statistics)
