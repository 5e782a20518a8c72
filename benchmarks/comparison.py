"""Keeps the result of a ``ccp compare`` among the figures of this package.

    ccp compare ... --output runs/budgets
    python -m benchmarks.comparison runs/budgets budgets_resnet56 [--measured-at COMMIT]

Writes ``results/<name>.json`` and ``.md``: the rows with machine, versions and commit, without the
folders that the weights and data lay in.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.common import RESULTS, write_results
from ccp_ext.files import write_text
from ccp_ext.report.summary import as_markdown

PATHS = ("weights", "data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--measured-at", help="commit that made the rows, if not this one")
    options = parser.parse_args()
    keep(options.folder, options.name, options.measured_at)


def keep(folder: Path, name: str, commit: str | None = None) -> None:
    result = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    for path in PATHS:
        result["settings"][path] = Path(result["settings"][path]).name
    measured = {"measured at commit": commit} if commit else {}
    write_results(name, measured | {key: result[key] for key in ("settings", "plain", "rows")})
    write_text(RESULTS / f"{name}.md", as_markdown(result))


if __name__ == "__main__":
    main()
