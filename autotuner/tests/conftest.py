"""What the tests of this room share: the tiny model's DecDEC folder, and a way to call scripts."""

import sys
from pathlib import Path

import pytest

from decdec.testing import run_script
from decdec.tiny import make_model

SETUP = Path(__file__).parents[2] / "decdec_setup"


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The tiny model at 3 bits with cheatsheet.pt and thresholds.pt."""
    original = make_model(tmp_path_factory.mktemp("tuner") / "tiny")
    out = original.parent / "tiny-w3"
    text = ("--text", "pydoc", "--samples", 4, "--length", 64)
    quantize = ("--model", original, "--method", "rtn", "--bits", 3, "--out", out)
    for script, *arguments in (("quantize.py", *quantize, *text), ("cheatsheet.py", out),
                               ("thresholds.py", out, *text)):
        result = run_script(SETUP / script, *arguments)
        assert result.returncode == 0, result.stderr
    return out


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script's main here, which saves the seconds that a new process takes to import torch; returns what it
    printed."""
    def run_main(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        script.main()
        return capsys.readouterr().out
    return run_main
