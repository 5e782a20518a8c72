"""All rows of a comparison, in one process or in several, and its tables."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from ccp_ext import allocation, files, repair
from ccp_ext.compare.bench import Bench
from ccp_ext.compare.jobs import Job, all_jobs
from ccp_ext.compare.settings import FINETUNE, CompareSettings
from ccp_ext.errors import InputError
from ccp_ext.pipeline import check_statistics
from ccp_ext.report import snapshot
from ccp_ext.report.summary import as_csv, as_markdown, control, rank, summarise
from ccp_ext.run_folder import RunFolder
from ccp_ext.subject import Inputs, load_inputs, sample

# Whatever seeds a folder began with, its page shows the same.
_SNAPSHOT_SEED = 0


def compare(
    settings: CompareSettings,
    output: str | os.PathLike[str],
    *,
    devices: Sequence[str] = ("cpu",),
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Make every row that the folder lacks, and the tables.

    The folder may hold a comparison of other criteria, budgets, repairs or seeds, all other
    settings equal, the schedule of fine-tuning among them: its rows stay, and the tables show those
    asked for now.

    Writes to the folder ``output``: ``settings.json``, ``plain.json``, a file for each row in
    ``rows``, for a row that is fine-tuned a CSV file of its epochs in ``logs``, and at the end
    ``snapshot.safetensors`` (matrices and maps for the page), ``comparison.json``,
    ``comparison.csv`` and ``comparison.md``.

    Args:
        devices: one process each, if there are several (a device may be named more than once);
            each makes a run of consecutive rows, so that almost all statistics are gathered once.
        say: gets a line for each row; must be a module's function if there are several devices.

    Returns:
        {"settings", "plain", "rows", "summary", "control", "ranks"}; of the last three see
        :mod:`ccp_ext.report.summary`. A row has the columns of :class:`Job`, MACs, parameters and
        their shares that are kept, the allocation that was taken and its forecast objective, how
        many channels each group keeps ("kept"), accuracy (percent) and loss on the halves of the
        test set and on the whole, the images that every layer had in the refits, by step what of
        the repair is not among the settings, such as the ridge of a refit ("repair options"), and
        the seconds and peak memory (MiB) of statistics, choice and repair.

    Raises:
        InputError: anything in the settings or the data that the user can mend, and a folder that
            another process works in; nothing is written before the inputs, the options and the
            budgets were found good.
    """
    inputs = load_inputs(settings, devices[0])
    _check(settings, inputs)
    with RunFolder.opened(output, {**settings.shared(), **inputs.contents()}) as folder:
        return _compare(settings, inputs, folder, devices, progress, say)


def _compare(
    settings: CompareSettings,
    inputs: Inputs,
    folder: RunFolder,
    devices: Sequence[str],
    progress: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    (folder.path / "rows").mkdir(exist_ok=True)
    jobs = all_jobs(settings)
    missing = [job for job in jobs if _read_row(folder, job) is None]
    if len(missing) < len(jobs):
        say(f"{len(jobs) - len(missing)} of {len(jobs)} rows are there")
    plain = folder.read("plain.json", dict)
    if plain is None:
        plain = Bench(settings, inputs, folder, progress).plain()
        folder.write("plain.json", plain)
    if len(devices) == 1:
        _make_rows(Bench(settings, inputs, folder, progress), missing, say)
    elif missing:
        _make_rows_in_parallel(settings, folder, missing, devices, say)
    # Of rows after which a run was stopped.
    folder.remove(*(name for job in jobs for name in job.temporary_files))
    rows = [_read_row(folder, job) for job in jobs]
    result = {
        "settings": dataclasses.asdict(settings),
        "plain": plain,
        "rows": rows,
        "summary": summarise(rows),
        "control": control(rows),
        "ranks": rank(rows),
    }
    folder.write("comparison.json", result)
    files.write_text(folder.path / "comparison.csv", as_csv(rows))
    files.write_text(folder.path / "comparison.md", as_markdown(result))
    _take_snapshot(settings, inputs, folder, progress)
    return result


def _take_snapshot(
    settings: CompareSettings, inputs: Inputs, folder: RunFolder, progress: bool
) -> None:
    """What the page shows of the plain model; behind the rows, whose memory is measured."""
    file = folder.path / snapshot.FILE
    if not file.exists():
        images = sample(inputs.train, snapshot.IMAGES, _SNAPSHOT_SEED, "statistics")
        snapshot.take(inputs.model, inputs.graph, images, progress=progress).save(file)


def _check(settings: CompareSettings, inputs: Inputs) -> None:
    """Find what would fail later on."""
    for kind, value in settings.budgets():
        allocation.allocate(inputs.graph, **{kind: value}, multiple=settings.multiple)
    for arm in settings.arms():
        criterion = arm.with_seed(settings.seeds[0])
        check_statistics(inputs.model, inputs.graph, criterion, settings.allocation_of(arm))
    if len(inputs.test) < 2:
        raise InputError("compare: the test set holds 1 image; it takes 2 to have two halves")


def _make_rows(bench: Bench, jobs: Sequence[Job], say: Callable[[str], None]) -> None:
    for done, job in enumerate(jobs, 1):
        row = bench.row(job)
        bench.folder.write(job.file, row)
        bench.folder.remove(*job.temporary_files)
        say(
            f"{done}/{len(jobs)} {job.criterion}, {job.kind} {job.budget}, {job.repair}, seed "
            f"{job.seed}: {row['all accuracy']:.2f} % on {bench.device}"
        )


def _make_rows_in_parallel(
    settings: CompareSettings,
    folder: RunFolder,
    jobs: Sequence[Job],
    devices: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """One process a device; if one fails, the others finish their rows first."""
    ends = [len(jobs) * k // len(devices) for k in range(len(devices) + 1)]
    threads = max(1, torch.get_num_threads() // len(devices))
    # CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(devices), context) as pool:
        running = [
            pool.submit(_worker, settings, folder, jobs[start:end], device, threads, say)
            for device, (start, end) in zip(devices, itertools.pairwise(ends), strict=True)
            if start < end
        ]
        for process in running:
            process.result()


def _worker(
    settings: CompareSettings,
    folder: RunFolder,
    jobs: Sequence[Job],
    device: str,
    threads: int,
    say: Callable[[str], None],
) -> None:
    torch.set_num_threads(threads)
    # Bars of several processes would overwrite one another.
    _make_rows(Bench(settings, load_inputs(settings, device), folder, False), jobs, say)


def _read_row(folder: RunFolder, job: Job) -> dict[str, Any] | None:
    row = folder.read(job.file, dict)
    if row is None:
        return None
    if any(row.get(k) != v for k, v in dataclasses.asdict(job).items()):
        raise InputError(f"{folder.path / job.file} is damaged; remove it to go on")
    options = repair.options(job.repair, [FINETUNE])
    if row.get("repair options", options) != options:
        raise InputError(
            f"{folder.path / job.file} was repaired with {row['repair options']}, not {options}; "
            "remove it to make it again"
        )
    return row
