"""The main job as a stranger runs it, on the tiny model."""

import os
import subprocess
import sys
from pathlib import Path

from decdec.files import read_rows

ROOT = Path(__file__).parents[2]


def quickstart(models):
    environment = os.environ | {"VENV": sys.prefix, "MODELS": str(models)}
    return subprocess.run([ROOT / "quickstart.sh", "--tiny"], capture_output=True, text=True, env=environment)


def test_tiny_quick_start_from_nothing_and_again(tmp_path):
    result = quickstart(tmp_path)
    assert result.returncode == 0, result.stderr
    rows = read_rows(tmp_path / "tiny-quickstart.jsonl")
    settings = {(row["method"], row["residual_bits"], row["nested"], row["k_chunk"]) for row in rows}
    assert settings == {("original", None, None, 0)} | {
        (method, *rest) for method in ("squeezellm", "awq")
        for rest in ((None, None, 0), (4, False, 8), (4, False, 32), *((2, True, k) for k in (8, 16, 32, 64, 128)))}
    for name in ("tiny-squeezellm-w3/cheatsheet.pt", "tiny-awq-w3/thresholds.pt", "tiny-quickstart.pdf", "tiny-quickstart.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert "2 bits nested" in result.stdout and "-- SqueezeLLM, 3 bits, k_chunk 32" in result.stdout

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".pt", ".jsonl")}
    result = quickstart(tmp_path)
    assert result.returncode == 0, result.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_unknown_option_is_refused():
    result = subprocess.run([ROOT / "quickstart.sh", "--fast"], capture_output=True, text=True)
    assert result.returncode == 2 and "unknown option --fast" in result.stderr
