"""The least time of every operator on an H200, computed from its bytes, operations and datasheet.

    python -m benchmarks.floors [operators] [--shapes resnet50]

Nothing is run: these are predictions to hold measurements against.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import sweep
from benchmarks.limits import Limits
from benchmarks.networks import NETWORKS
from benchmarks.suite import OPERATIONS
from ccp_ext.report import table

# Nominal: HBM3e bandwidth, rates of multiply-adds and of dense matrix products.
H200 = Limits(4.8e12, 4.8e12, 4.8e12, {"fma": 67e12, "fp32": 67e12, "tf32": 494e12, "bf16": 989e12})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operators", nargs="*", default=[], metavar="operator")
    parser.add_argument("--shapes", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    options = parser.parse_args(arguments)
    names = options.operators or list(OPERATIONS)
    print(table([row for name in names for n in options.shapes for row in floors(name, n)]))


def floors(operator: str, network: str) -> list[dict]:
    """Bytes, operations and the predicted least time for every distinct size and type."""
    operation, rows = OPERATIONS[operator], []
    for case in sweep.cases(operation, network, "cuda", NETWORKS[network].batch):
        if case.layout != operation.layouts[0]:
            continue  # the layout changes neither bytes nor operations
        work = operation.work(case)
        seconds, bound = H200.floor(work)
        rows.append(
            {
                "operator": operator,
                "size": case.label,
                "dtype": str(case.dtype).removeprefix("torch."),
                "MB": 1e-6 * work.bytes,
                "GFLOP": 1e-9 * work.operations,
                "predicted least us": 1e6 * seconds,
                "bound by": bound,
            }
        )
    return rows


if __name__ == "__main__":
    main()
