"""What a search tells while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ccp_ext.errors import InputError
from ccp_ext.progress import tqdm

_BAR_AFTER = 1.0  # seconds


class Progress:
    """What the solver calls: a bar that appears after a while, the caller's function, or None."""

    def __init__(self, wanted: bool | Callable[..., None], unscaled: Callable[[float], float]):
        self.wanted, self.unscaled = wanted, unscaled
        self.bar: tqdm | None = None

    def __enter__(self) -> Callable[[float, float], None] | None:
        if self.wanted is False:
            return None
        if self.wanted is True:
            self.bar = tqdm(desc="select", unit="report", delay=_BAR_AFTER, leave=False)
        elif not callable(self.wanted):
            raise InputError(f"select: progress must be a bool or a function; got {self.wanted!r}")
        return self.report

    def report(self, objective: float, bound: float) -> None:
        objective, bound = self.unscaled(objective), self.unscaled(bound)
        if self.bar is None:
            self.wanted(objective, bound)
        else:
            self.bar.set_postfix_str(f"gap {objective - bound:.3g}", refresh=False)
            self.bar.update()

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
