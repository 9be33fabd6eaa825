"""How a script's main ends."""

import errno

import pytest
import torch

from decdec.errors import UserError, run

FULL = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.19 GiB."


@pytest.mark.parametrize("error, message", [
    (UserError("k_chunk: expected 0..1024, got 2000"), "error: k_chunk: expected 0..1024, got 2000"),
    (torch.OutOfMemoryError(FULL), "error: GPU memory: CUDA out of memory. Tried to allocate 20.00 GiB"),
    (OSError(errno.ENOSPC, "No space left on device", "rows.jsonl"), "error: rows.jsonl: No space left on device"),
    (KeyboardInterrupt(), 130)])
def test_what_a_user_can_mend_ends_in_one_line(error, message):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == message


@pytest.mark.parametrize("error", [RuntimeError("a fault"), OSError(errno.EIO, "I/O error")])
def test_faults_are_not_hidden(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run(main)
