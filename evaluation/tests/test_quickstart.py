"""The main job as a stranger runs it, on the tiny model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("arguments, says", [(["--fast"], "unknown option --fast"), (["a", "b"], "expected one, got a and b"),
                                             (["--tiny", "a"], "leave out a")])
def test_other_arguments_are_refused(arguments, says):
    result = subprocess.run([ROOT / "quickstart.sh", *arguments], capture_output=True, text=True)
    assert result.returncode == 2 and says in result.stderr


STAND_IN = """#!/bin/sh
# In place of Python: notes what it is called with, makes environments of itself, and has or has no torch.
echo "$0 $*" >>LOG
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip show torch") [ -n "$TORCH" ] ;;
    *quantize.py*) exit 1 ;;
esac
"""


@pytest.fixture
def stand_in(tmp_path):
    """Runs quickstart.sh from ``tmp_path`` on an environment ``own`` of the stand-in; gives its calls."""
    python = tmp_path / "python"
    python.write_text(STAND_IN.replace("LOG", str(tmp_path / "log")))
    python.chmod(0o755)

    def run(*arguments, **environment):
        environment = os.environ | {"VENV": "own", "MODELS": "made", "PYTHON": str(python), "TORCH": ""} | environment
        subprocess.run([ROOT / "quickstart.sh", *arguments], cwd=tmp_path, env=environment, capture_output=True)
        return (tmp_path / "log").read_text()

    return run


def test_paths_are_those_of_the_callers_folder(stand_in, tmp_path):
    (tmp_path / "mine").mkdir()
    calls = stand_in("mine")
    assert f"--model {tmp_path}/mine" in calls and f"--out {tmp_path}/made/mine-squeezellm-w3" in calls
    assert not (ROOT / "own").exists() and not (ROOT / "made").exists()


def test_a_half_made_environment_is_made_again(stand_in, tmp_path):
    (tmp_path / "own" / "bin").mkdir(parents=True)
    python = tmp_path / "own" / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 1\n")  # without pip, as interrupted or without Debian's python3-venv
    python.chmod(0o755)
    assert "pip install" in stand_in("--install")
    again = stand_in("--install")
    assert again.count("-m venv") == 1 and again.count("-r requirements.txt") == 1


@pytest.mark.parametrize("torch", ["", "there"])
def test_a_torch_that_is_there_stays(stand_in, tmp_path, torch):
    install, = re.findall("-r requirements.txt -c (.*)", stand_in("--install", TORCH=torch))
    pinned = (ROOT / install).read_text().splitlines()
    left_out = set((ROOT / "constraints.txt").read_text().splitlines()) - set(pinned)
    assert {line.partition("==")[0] for line in left_out} == ({"torch"} if torch else set())
