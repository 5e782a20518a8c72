"""Files that are either the old version or the new one, never half of one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ccp_ext.errors import InputError

LOCK = ".lock"


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on a clean exit it replaces ``path`` in one step.

    The data is flushed to disk before the rename. On any exception, a keyboard interrupt included,
    the temporary file is removed and an existing ``path`` stays as it was.
    """
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes that ask for it out of a folder, while the block runs.

    The lock is on a file in the folder that holds the process's number; the system gives it up
    when the process ends, however it does.

    Raises:
        InputError: another process has the folder, or no file can be written there.
    """
    path = Path(folder, LOCK)
    handle = _open_locked(path)
    try:
        os.truncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _open_locked(path: Path) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(
                f"{os.fspath(path.parent)} must be a folder in which files can be written; its "
                f"{path.name} cannot be: {error.strerror}"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 32).decode()
            os.close(handle)
            raise InputError(
                f"{os.fspath(path.parent)} is in use by process {owner}; wait for it, end it, or "
                "choose another folder"
            ) from None
        except OSError:
            return handle  # a file system without locks
        # Whoever had it before may have removed the file after it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """What ``torch.save`` wrote to ``path``, on the CPU; only tensors and plain values are read.

    Raises:
        InputError: the file is missing, damaged, or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way, at any byte
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise InputError(f"{os.fspath(path)} is not a readable PyTorch file: {reason}") from error


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
