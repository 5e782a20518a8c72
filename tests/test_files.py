"""Files are the old version or the new one."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys

import pytest

from ccp_ext.errors import InputError
from ccp_ext.files import LOCK, atomic_path, locked, write_text


def test_a_finished_write_replaces_the_file_with_ordinary_permissions(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    write_text(path, "new")
    assert path.read_text() == "new"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file_whole_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_has_one_process_at_a_time(tmp_path):
    with locked(tmp_path):
        message = f"{tmp_path} is in use by process {os.getpid()}"
        with pytest.raises(InputError, match=message), locked(tmp_path):
            pass
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("place", ["missing", "file", "folder"])
def test_a_folder_without_room_for_a_lock_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / LOCK).mkdir(parents=True)
    message = f"{tmp_path / place} must be a folder in which files can be written; its .lock"
    with pytest.raises(InputError, match=message), locked(tmp_path / place):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(InputError, match="Permission denied"), locked(tmp_path):
        pass


HOLDER = """
import sys, time
from ccp_ext.files import locked
with locked(sys.argv[1]):
    print("has it", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_its_folder_to_others(tmp_path):
    command = [sys.executable, "-c", HOLDER, os.fspath(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "has it\n"
        with pytest.raises(InputError, match=f"process {other.pid};"), locked(tmp_path):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == []
