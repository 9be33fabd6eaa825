"""A tiny original model and a 3-bit folder made from it by decdec_setup, shared by the tests of this room."""

import subprocess
import sys
from pathlib import Path

import pytest

from decdec.tiny import make_model

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run one of the repository's scripts as a user would."""
    command = [sys.executable] if script.endswith(".py") else ["bash"]
    return subprocess.run([*command, ROOT / script, *map(str, arguments)], capture_output=True, text=True)


def refused(result: subprocess.CompletedProcess) -> str:
    """The one line of an error; a stack trace or a zero exit fails the test."""
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def folder(original) -> Path:
    """Round-to-nearest 3 bits, with a 4-bit cheatsheet.pt, thresholds.pt and an exact residual in exact.pt."""
    out = original.parent / "tiny-rtn-w3"
    text = ("--text", "pydoc", "--samples", 4, "--length", 64)
    for script, *arguments in (("quantize.py", "--model", original, "--method", "rtn", "--bits", 3, "--out", out, *text),
                               ("cheatsheet.py", out), ("cheatsheet.py", out, "--bits", 16, "--out", out / "exact.pt"),
                               ("thresholds.py", out, *text)):
        result = run(f"decdec_setup/{script}", *arguments)
        assert result.returncode == 0, result.stderr
    return out
