"""A tiny original model and a 3-bit folder made from it by decdec_setup, shared by the tests of this room."""

from pathlib import Path

import pytest

from decdec.testing import run_script
from decdec.tiny import make_model

ROOT = Path(__file__).parents[2]


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
        result = run_script(ROOT / "decdec_setup" / script, *arguments)
        assert result.returncode == 0, result.stderr
    return out
