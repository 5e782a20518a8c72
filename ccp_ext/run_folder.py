"""The folder of a run, from which it can go on after a stop."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ccp_ext import files
from ccp_ext.errors import InputError
from ccp_ext.plan import PruningPlan


class RunFolder:
    """The files of one run."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, path: str | os.PathLike[str], settings: Mapping[str, Any]
    ) -> Iterator[RunFolder]:
        """Made for one set of settings and inputs, refused for another; other processes are kept
        out before anything in it is read.

        Raises:
            InputError: the folder holds a run with other settings or inputs (the first that differs
                is named), or a damaged file, or cannot be written, or another process has it.
        """
        folder = cls(path)
        with folder._writing():
            folder.path.mkdir(parents=True, exist_ok=True)
        with files.locked(path):
            folder._match(json.loads(json.dumps(settings)))
            yield folder

    def _match(self, mine: dict[str, Any]) -> None:
        theirs = self.read("settings.json", dict)
        if theirs is None:
            with self._writing():
                self.write("settings.json", mine)
        elif theirs != mine:
            raise InputError(
                f"output {os.fspath(self.path)!r} holds a run {_difference(theirs, mine)}; choose "
                "another folder or remove this one"
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"output {os.fspath(self.path)!r} cannot be written: {error}"
            ) from error

    def read(self, name: str, kind: type) -> Any:
        """The content of a JSON file, or None if there is none."""
        file = self.path / name
        if not file.exists():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is not readable JSON: {error}") from error
        if not isinstance(content, kind):
            raise InputError(f"{file} is damaged; remove it or choose another folder")
        return content

    def write(self, name: str, content: Any) -> None:
        files.write_text(self.path / name, json.dumps(content, indent=1) + "\n")

    def plan(self, name: str = "plan.json") -> PruningPlan | None:
        file = self.path / name
        return PruningPlan.load(file) if file.exists() else None

    def remove(self, *names: str) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)


def _difference(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """The first in which settings that are there differ from these."""
    for name in {**mine, **theirs}:
        if name not in theirs or name not in mine:
            knows = "lacks" if name not in theirs else "has"
            return f"of another version of ccp_ext, which {knows} the setting {name}"
        if mine[name] != theirs[name]:
            return f"with {name}={theirs[name]!r}, not {mine[name]!r}"
    raise ValueError("the settings are equal")
