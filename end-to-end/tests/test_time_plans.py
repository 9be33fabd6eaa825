"""Timing of plans: what the autotuner asks this runtime."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from decdec.plan import Choice, Device, Plan, Tuned, save_plan
from decdec.testing import quick_folder, refused, run_script
from decdec.tiny import make_model

SCRIPT = Path(__file__).parents[1] / "time_plans.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    original = make_model(tmp_path_factory.mktemp("plans") / "tiny")
    made = quick_folder(AutoModelForCausalLM.from_pretrained(original), original.parent / "w3")
    choices = tuple(Choice(kind, 3, 64, 64, 2, 4, 900, 1.0, 2.0) for kind in ("qkv", "o", "gu", "d"))
    tuned = Tuned(5, "end-to-end", "paper", 4.0, None, 1.0, None, choices)
    save_plan(made / "some.json", Plan("tiny", "rtn", None, Device("made up", 20, True), "bucket", 1.0, 1.0, None, {}, (tuned,)))
    return made


def time_plans(folder, *lines):
    return run_script(SCRIPT, "--model", folder, "--device", "cpu", "--prompt-tokens", 2, "--new-tokens", 3,
                      input="".join(f"{line}\n" for line in lines))


def test_each_line_is_answered(folder):
    result = time_plans(folder, "{}", json.dumps({"plan": str(folder / "some.json"), "target": 5}))
    assert result.returncode == 0, result.stderr
    base, both = map(json.loads, result.stdout.splitlines())
    assert set(base) == {"base_ms"} and set(both) == {"base_ms", "ms"} and min(*base.values(), *both.values()) > 0


@pytest.mark.parametrize(("line", "says"), [
    ("5", "stdin: expected lines such as"), ("not JSON", "stdin: expected lines such as"),
    ('{"plan": "no-such-plan.json"}', "no-such-plan.json: no such file")])
def test_other_lines_are_refused(folder, line, says):
    assert says in refused(time_plans(folder, line))
