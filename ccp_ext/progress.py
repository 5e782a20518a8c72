"""The progress bar of all loops: tqdm's, or none where tqdm is not installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

try:
    from tqdm import tqdm
except ImportError:  # a machine for kernels and measurements may have torch and little else

    class tqdm:
        """Shows nothing; as far as this package uses the real one."""

        def __init__(self, items: Iterable[Any] = (), *_: Any, **__: Any) -> None:
            self._items = items

        def __iter__(self) -> Iterator[Any]:
            return iter(self._items)

        def __enter__(self) -> tqdm:
            return self

        def __exit__(self, *_: Any) -> None:
            self.close()

        def close(self) -> None:
            pass

        def update(self, n: int = 1) -> None:
            pass

        def set_postfix(self, **_: Any) -> None:
            pass

        def set_postfix_str(self, text: str, refresh: bool = True) -> None:
            pass


__all__ = ["tqdm"]
