"""The rows of a comparison, named before they are made."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ccp_ext.compare.settings import FINETUNE, Arm, CompareSettings, repair_steps
from ccp_ext.report.summary import UNPRUNED


@dataclass(frozen=True)
class Job:
    """What makes a row: the names of its first columns, in their order."""

    criterion: str
    kind: str
    budget: float | int
    repair: str
    seed: int

    @property
    def file(self) -> str:
        name = "--".join(str(value) for value in dataclasses.astuple(self))
        return f"rows/{re.sub(r'[^A-Za-z0-9._+-]', '_', name)}.json"

    @property
    def checkpoint(self) -> str:
        """Of its fine-tuning."""
        return str(PurePosixPath(self.file).with_suffix(".pt"))

    @property
    def heads(self) -> str:
        """The auxiliary heads that its fine-tuning begins with."""
        return str(PurePosixPath(self.file).with_suffix(".heads.pt"))

    @property
    def log(self) -> str:
        """A line for each epoch of its fine-tuning."""
        return f"logs/{PurePosixPath(self.file).stem}.csv"

    @property
    def temporary_files(self) -> tuple[str, ...]:
        """Of no use once the row is written."""
        return self.checkpoint, self.heads


def all_jobs(settings: CompareSettings) -> list[Job]:
    """All rows, those that share statistics together, and the control's."""
    jobs = [
        Job(arm.label, kind, value, steps, seed)
        for seed in settings.seeds
        for arm in _sharing_together(settings.arms(), seed)
        for kind, value in settings.budgets()
        for steps in settings.repair
    ]
    if any(FINETUNE in repair_steps(text) for text in settings.repair):
        kind, _ = settings.budgets()[0]
        jobs += [Job(UNPRUNED, kind, 1.0, FINETUNE, seed) for seed in settings.seeds]
    return jobs


def _sharing_together(arms: Sequence[Arm], seed: int) -> list[Arm]:
    keys = [statistics_key(arm, seed) for arm in arms]
    return [arm for _, arm in sorted(zip(keys, arms, strict=True), key=lambda p: keys.index(p[0]))]


def statistics_key(arm: Arm, seed: int) -> str:
    """Equal for arms whose statistics are equal."""
    needed = arm.with_seed(seed).statistics()
    if needed is None:
        return f"{arm.criterion} {arm.options}"
    return json.dumps(needed, sort_keys=True)
