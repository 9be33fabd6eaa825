"""Every command of the README, in its tiny form."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from decdec.testing import run_script

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"^\| `([^`]+)` \|", (ROOT / "evaluation/README.md").read_text(encoding="utf-8"), re.MULTILINE)
FIGURES = [command.split()[1] for command in COMMANDS if re.match(r"evaluation/evaluate\.sh (fig|table)\d", command)]
SCRIPTS = [command for command in COMMANDS if not command.startswith("evaluation/evaluate.sh")]
TEXT = "--text pydoc --length 64"
SHORT = {"perplexity.py": "--text pydoc --windows 1 --length 64", "lm_tasks.py": "--limit 1", "mt_bench_answer.py": "--max-new-tokens 2",
         "error_curve.py": TEXT, "outliers.py": "--text pydoc --steps 8", "recall.py": TEXT, "tuned.py": f"{TEXT} --windows 1",
         "selection_study.py": f"{TEXT} --windows 1 --calibration pydoc --samples 1 --k-chunk 8"}


def test_each_figure_has_its_line_and_all_makes_them(everything):
    script = (ROOT / "evaluation/evaluate.sh").read_text(encoding="utf-8")
    assert FIGURES == re.search(r"for part in (.*) report; do", script).group(1).split()
    assert {f"evaluation/evaluate.sh {name} ORIGINAL FOLDER" for name in [*FIGURES, "all", "report"]} <= set(COMMANDS)
    made = {re.sub(r"\D", "", path.stem.split("_")[0]).lstrip("0") for path in everything.iterdir() if path.suffix in (".png", ".md")}
    assert made >= {re.sub(r"\D", "", name) for name in FIGURES}  # every one was made by `all`, through the same function


def scripts_of(what, folder, tmp_path, **environment):
    """The command lines of ``evaluate.sh WHAT`` with an interpreter that does nothing but keep them."""
    log, python = tmp_path / "log", tmp_path / "python"
    log.write_text("")
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    python.chmod(0o755)
    result = subprocess.run([ROOT / "evaluation/evaluate.sh", what, "original", folder], capture_output=True, text=True,
                            env={"PATH": os.environ["PATH"], "PYTHON": str(python), "RESULTS": str(tmp_path / "results")} | environment)
    assert result.returncode == 0, result.stderr
    called = (line.partition(" ") for line in log.read_text().splitlines())
    return [f"{Path(script).name} {rest}" for script, _, rest in called], result.stderr


def test_all_without_data_passes_over_figure_15_alone(tmp_path, folder):
    lines, said = scripts_of("all", folder, tmp_path)
    assert "Figure 15 is passed over" in said and lines[-1].startswith("report.py") and not any("mt_bench" in line for line in lines)
    assert any(line.startswith("lm_tasks.py") and "--tasks bbh_cot_fewshot --out" in line for line in lines)
    lines, _ = scripts_of("fig14", folder, tmp_path, DATA="data")
    assert all("--tasks bbh_cot_fewshot_* --data data" in line for line in lines if line.startswith("lm_tasks.py"))


def test_plans_and_residuals_are_asked_for_unless_they_are_of_these_weights(tmp_path, folder):
    environment = {"CLIENTS": "4050M", "TARGETS": "5 10"}
    plan = tmp_path / "results/plans/tiny-rtn-w3-4050M-5-10.json"
    plan.parent.mkdir(parents=True)
    made = []
    weights = json.loads((folder / "config.json").read_text())["quantization_config"]["weights_hash"]
    for content in ("other", weights):
        plan.write_text(json.dumps({"weights_hash": content}, indent=2))
        made.append(any(line.startswith("tuner.py") for line in scripts_of("fig17", folder, tmp_path, **environment)[0]))
    assert made == [True, False]
    assert any(line.startswith("tuner.py") and f"{plan.stem[:-5]}-law-5-10.json" in line
               for line in scripts_of("fig17", folder, tmp_path, LAW="1", **environment)[0])
    lines, _ = scripts_of("table2", folder, tmp_path)
    assert [bits for bits in (2, 4, 8, 16) if any(line.startswith("cheatsheet.py") and f"--bits {bits} " in line for line in lines)] \
        == [2, 4, 8, 16]


@pytest.mark.parametrize(("bits", "found"), [(4, "cheatsheet.pt"), (16, "residual_16.pt"), (2, "residual_2.pt")])
def test_residuals_that_are_there_are_not_made_again(folder, bits, found):
    assert run_script(ROOT / "evaluation/sheet_of.py", folder, bits).stdout == f"{folder / found}\n"


@pytest.mark.parametrize("name", ["fig12", "report"])
def test_a_figure_by_itself(everything, name):
    result = subprocess.run([ROOT / "evaluation/evaluate.sh", name, "--tiny"], capture_output=True, text=True,
                            env=os.environ | {"RESULTS": str(everything), "PYTHON": sys.executable})
    assert result.returncode == 0 and "wrote" in result.stdout, result.stderr


def test_perplexity_alone(everything, original, folder):
    assert "evaluation/evaluate.sh ROWS.jsonl ORIGINAL FOLDER" in COMMANDS
    rows = everything.with_name(f"{everything.name}.jsonl")
    before = rows.read_text()
    tiny = {"PYTHON": sys.executable, "TEXT": "pydoc", "WINDOWS": "2", "LENGTH": "64", "K_CHUNKS": "0 8 32"}
    result = subprocess.run([ROOT / "evaluation/evaluate.sh", rows, original, folder], capture_output=True, text=True,
                            env=os.environ | tiny)
    assert result.returncode == 0 and "k_chunk" in result.stdout, result.stderr
    assert rows.read_text() == before and rows.with_suffix(".png").stat().st_size > 0


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_script(everything, folder, data, tmp_path, command):
    bench = shutil.copytree(everything / "mt_bench", tmp_path / "mt_bench")  # answers are added to it
    places = {"FOLDER": folder, "DATA": data, "MT": bench, "PLAN": everything / "plans/tiny-rtn-w3-4050M-50-400.json",
              "ROWS": everything.with_name(f"{everything.name}.jsonl"), "gpt-4o_single": "stand-in_single", "wikitext": "pydoc",
              "evaluation": ROOT / "evaluation"}
    words = shlex.split(re.sub(rf"\b({'|'.join(places)})\b", lambda match: str(places[match.group()]), command))
    script = next((Path(word).name for word in words if word.endswith(".py")), "")
    words += SHORT.get(script, "").split()
    if words[0] == "accelerate":
        words = ["-m", "accelerate.commands.launch", "--cpu", *words[2:]]
    elif script == "mt_bench_judge.py":
        words = [ROOT / "evaluation/stand_in_judge.py", sys.executable, *words[1:]]
    else:
        words = words[1:]
    # In a folder of its own, for the rows go to evaluation/results/ unless told otherwise.
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout, result.stderr
