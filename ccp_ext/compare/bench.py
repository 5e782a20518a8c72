"""Making one row: statistics, choice, surgery, repair and test of one model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ccp_ext import criteria, measure, repair, surgery
from ccp_ext.compare.jobs import Job, statistics_key
from ccp_ext.compare.settings import FINETUNE, Arm, CompareSettings, repair_steps
from ccp_ext.datasets import ImageSet
from ccp_ext.evaluation import Evaluation, evaluate
from ccp_ext.finetune import finetune
from ccp_ext.graph import ChannelGraph
from ccp_ext.pipeline import auxiliary_heads, joint_cost
from ccp_ext.plan import PruningPlan
from ccp_ext.planning import make_plan
from ccp_ext.report.summary import COSTS, PARTS, UNPRUNED
from ccp_ext.run_folder import RunFolder
from ccp_ext.subject import Inputs, sample


@dataclass
class Bench:
    """Makes rows on one device; the last statistics and the last plan are kept for the next row."""

    settings: CompareSettings
    inputs: Inputs
    folder: RunFolder
    progress: bool
    _last: dict[str, tuple[Any, Any, measure.Resources]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.inputs.example.device

    def plain(self) -> dict[str, Any]:
        """The unpruned model, its channels by group, and how the test images are halved."""
        images = len(self.inputs.test)
        found = {"selection images": images // 2, "report images": images - images // 2}
        found["halves"] = "alternating" if is_sorted(self.inputs.test) else "in order"
        found["channels"] = {group.name: group.channels for group in self.inputs.graph.groups}
        return self._size(self.inputs.model) | self._evaluations(self.inputs.model) | found

    def row(self, job: Job) -> dict[str, Any]:
        model, chosen = copy.deepcopy(self.inputs.model), {}
        kept = {group.name: group.channels for group in self.inputs.graph.groups}
        gathering = choosing = measure.Resources(0.0, 0.0)
        if job.criterion != UNPRUNED:
            plan, gathering, choosing = self._plan(job)
            model = surgery.prune(model, plan)
            chosen = plan.record["allocation"]
            kept |= {name: len(group.kept) for name, group in plan.groups.items()}
        repairing, images = self._repair(model, job)
        row = dataclasses.asdict(job) | self._size(model)
        row |= {"allocation": chosen.get("method"), "objective": chosen.get("objective")}
        row["kept"] = kept
        row |= self._evaluations(model)
        row["repair images"] = images
        row["repair options"] = repair.options(job.repair, [FINETUNE])
        for name, used in zip(COSTS, (gathering, choosing, repairing), strict=True):
            row[f"{name} seconds"] = used.seconds
            row[f"{name} MiB"] = used.mebibytes
        return row | {"memory": measure.memory_kind(self.device), "device": str(self.device)}

    def _plan(self, job: Job) -> tuple[PruningPlan, measure.Resources, measure.Resources]:
        arm = Arm.parse(job.criterion)
        criterion, method = arm.with_seed(job.seed), self.settings.allocation_of(arm)

        def gathered() -> Any:
            images = sample(self.inputs.train, self.settings.images, job.seed, "statistics")
            return criteria.gather(
                self.inputs.model,
                self.inputs.graph,
                criterion,
                images,
                batch_size=self.settings.batch_size,
                keep_rows=method == "joint",
                progress=self.progress,
            )

        def chosen() -> PruningPlan:
            costs = criterion.costs(self.inputs.model, self.inputs.graph, stats)
            return make_plan(
                self.inputs.graph,
                costs,
                **{job.kind: job.budget},
                allocation=method,
                joint=joint_cost(method, criterion, stats),
                multiple=self.settings.multiple,
                progress=self.progress,
            )

        key = (statistics_key(arm, job.seed), job.seed, method == "joint")
        stats, gathering = self._once("statistics", key, gathered)
        key = dataclasses.replace(job, repair="")
        plan, choosing = self._once("plan", key, chosen)
        return plan, gathering, choosing

    def _once(self, what: str, key: Any, make: Callable[[], Any]) -> tuple[Any, measure.Resources]:
        """What ``make`` returns and takes, kept until another key is asked for."""
        if what not in self._last or self._last[what][0] != key:
            self._last.pop(what, None)  # so that two are never in memory
            with measure.resources(self.device) as used:
                value = make()
            self._last[what] = (key, value, used)
        return self._last[what][1:]

    def _repair(self, slim: nn.Module, job: Job) -> tuple[measure.Resources, int | None]:
        """What it took, and the images that every layer had in the refits, if there were any."""
        images = sample(self.inputs.train, self.settings.repair_images, job.seed, "repair")
        total, counts = measure.Resources(0.0, 0.0), []
        for step in repair_steps(job.repair):
            if step == FINETUNE:
                used = self._finetune(slim, job)
            else:
                with measure.resources(self.device) as used:
                    refitted = repair.apply(
                        step,
                        self.inputs.model,
                        slim,
                        images,
                        batch_size=self.settings.batch_size,
                        memory=self.settings.repair_memory,
                        progress=self.progress,
                    )
                if refitted is not None:
                    counts += refitted.images.values()
            total = total.then(used)
        return total, min(counts, default=None)

    def _finetune(self, slim: nn.Module, job: Job) -> measure.Resources:
        log = self.folder.path / job.log
        log.parent.mkdir(exist_ok=True)
        with measure.resources(self.device) as used:
            history = finetune(
                slim,
                self.inputs.train,
                self.settings.finetune,
                seed=job.seed,
                teacher=self.inputs.model if self.settings.distil else None,
                auxiliary=auxiliary_heads(
                    slim,
                    self.inputs,
                    self._heads(job),
                    job.seed,
                    self.folder.path / job.heads,
                    progress=self.progress,
                ),
                checkpoint=self.folder.path / job.checkpoint,
                log=log,
                progress=self.progress,
            )
        # Of all epochs: some may have run before an interruption.
        return measure.Resources(sum(epoch.seconds for epoch in history), used.mebibytes)

    def _heads(self, job: Job) -> int:
        if job.criterion == UNPRUNED:
            return 0
        return Arm.parse(job.criterion).with_seed(job.seed).auxiliary_heads

    def _size(self, model: nn.Module) -> dict[str, Any]:
        macs, parameters = measure.macs(model, self.inputs.example), measure.parameters(model)
        graph: ChannelGraph = self.inputs.graph
        return {
            "MACs": macs,
            "MACs kept": macs / graph.macs(),
            "parameters": parameters,
            "parameters kept": parameters / graph.parameters(),
        }

    def _evaluations(self, model: nn.Module) -> dict[str, float]:
        test = self.inputs.test
        first, second = (self._evaluate(model, test.subset(part)) for part in halves(test))
        results = dict(zip(PARTS, (first, second, _together(first, second)), strict=True))
        return {
            f"{part} {name}": getattr(result, name)
            for part, result in results.items()
            for name in ("accuracy", "loss")
        }

    def _evaluate(self, model: nn.Module, images: ImageSet) -> Evaluation:
        return evaluate(model, images, batch_size=self.settings.batch_size, progress=self.progress)


def halves(test: ImageSet) -> tuple[range, range]:
    """The first half of the test set and the second.

    Of one that is sorted by class, where these would hold other classes, every second image.
    """
    count, half = len(test), len(test) // 2
    if is_sorted(test):
        return range(1, count, 2), range(0, count, 2)
    return range(half), range(half, count)


def is_sorted(images: ImageSet) -> bool:
    """By class."""
    return bool((images.labels.diff() >= 0).all())


def _together(first: Evaluation, second: Evaluation) -> Evaluation:
    count = first.count + second.count

    def mean(name: str) -> float:
        parts = (first, second)
        return sum(getattr(part, name) * part.count for part in parts) / count

    return Evaluation(mean("accuracy"), mean("loss"), count)
