"""A tiny original model, a 3-bit folder made from it by decdec_setup, and a tiny run of everything, shared by the tests of this room."""

import os
from pathlib import Path

import pytest
import tiny_data

from decdec.testing import run_script
from decdec.tiny import make_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> Path:
    """Folder that the tiny form of evaluate.sh works in; the models of the other fixtures lie where it looks for them."""
    return tmp_path_factory.mktemp("evaluation") / "tiny"


@pytest.fixture(scope="session")
def original(results) -> Path:
    return make_model(results / "models/tiny")


@pytest.fixture(scope="session")
def folder(original) -> Path:
    """Round-to-nearest 3 bits, with a 4-bit cheatsheet.pt, thresholds.pt and an exact residual in residual_16.pt."""
    out = original.parent / "tiny-rtn-w3"
    text = ("--text", "pydoc", "--samples", 4, "--length", 64)
    for script, *arguments in (("quantize.py", "--model", original, "--method", "rtn", "--bits", 3, "--out", out, *text),
                               ("cheatsheet.py", out), ("cheatsheet.py", out, "--bits", 16, "--out", out / "residual_16.pt"),
                               ("thresholds.py", out, *text)):
        result = run_script(ROOT / "decdec_setup" / script, *arguments)
        assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def data(results) -> Path:
    tiny_data.write(results / "data")
    return results / "data"


@pytest.fixture(scope="session")
def everything(results, folder, data) -> Path:
    """``results`` after every figure and table has been made in its tiny form."""
    result = run_script(ROOT / "evaluation/evaluate.sh", "all", "--tiny", env=os.environ | {"RESULTS": str(results)})
    assert result.returncode == 0, result.stderr
    return results
