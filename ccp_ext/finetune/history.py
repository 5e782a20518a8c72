"""What the epochs of a fine-tuning came to."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
from collections.abc import Callable, Iterator


@dataclasses.dataclass(frozen=True)
class EpochRecord:
    """One epoch, counted from 1.

    learning_rate: of its last step. train_loss, train_accuracy (percent): means over the epoch's
    batches as trained on, in nats. validation_*: at its end, None where not measured.
    seconds: time of training and validation.
    """

    epoch: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    validation_loss: float | None
    validation_accuracy: float | None
    seconds: float


History = list[EpochRecord]


@contextlib.contextmanager
def epoch_log(
    path: str | os.PathLike[str] | None, past: History
) -> Iterator[Callable[[EpochRecord], None]]:
    """Yield a function that writes a row to the CSV file ``path``; without a path it does nothing.

    The file begins anew with ``past``: rows after the checkpoint are about to be trained again.
    """
    if path is None:
        yield lambda record: None
        return
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)

        def write(*records: EpochRecord) -> None:
            writer.writerows(map(dataclasses.astuple, records))
            file.flush()

        writer.writerow(field.name for field in dataclasses.fields(EpochRecord))
        write(*past)
        yield write
