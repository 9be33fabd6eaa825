"""Writing files: whole or not at all, with the user's mode, and nothing left behind."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from decdec import files

KILLED = """
import os, signal, sys
from decdec.files import atomic
with atomic(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_rows_that_the_disk_has_no_room_for_are_not_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    files.append_row(path, {"a": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))  # a write beyond stops there, as on a full disk
    try:
        with pytest.raises(OSError) as caught:
            files.append_row(path, {"key": "a row that is long"}, {"b": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert path.read_text() == '{"a": 1}\n'
    files.append_row(path, {"b": 2})
    assert files.read_rows(path) == [{"a": 1}, {"b": 2}]


def test_what_a_killed_process_left_goes_when_nobody_can_be_writing_it(tmp_path):
    path, other = tmp_path / "sheet[1].pt", tmp_path / ".sheet[1].pt.notes"
    other.touch()
    os.utime(other, (0, 0))
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", KILLED, path]).returncode == -signal.SIGKILL
    old, young = (file for file in tmp_path.iterdir() if file != other)
    os.utime(old, (time.time() - 2 * files.ABANDONED,) * 2)
    files.write_torch(path, {"a": 1})
    assert set(tmp_path.iterdir()) == {path, other, young}


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_mode_that_the_user_wants(tmp_path, mask):
    before = os.umask(mask)
    try:
        files.write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"a": object()})
    assert files.read_json(tmp_path / "a.json") == {"a": 1} and len(list(tmp_path.iterdir())) == 1
