"""Timing of plans: what the autotuner asks this runtime."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import time_plans

from decdec.errors import UserError
from decdec.plan import Choice, Device, Plan, Tuned, save_plan
from decdec.testing import refused, run_script

SCRIPT = Path(__file__).parents[1] / "time_plans.py"


@pytest.fixture
def plan(tmp_path) -> str:
    choices = tuple(Choice(kind, 3, 64, 64, 2, 4, 900, 1.0, 2.0) for kind in ("qkv", "o", "gu", "d"))
    tuned = Tuned(5, "end-to-end", "paper", 4.0, None, 1.0, None, choices)
    save_plan(tmp_path / "some.json", Plan("tiny", "rtn", None, Device("made up", 20, True), "bucket", 1.0, 1.0, None,
                                             {}, (tuned,)))
    return str(tmp_path / "some.json")


def timed(folder, *lines):
    return run_script(SCRIPT, "--model", folder, "--device", "cpu", "--prompt-tokens", 2, "--new-tokens", 3,
                      input="".join(f"{line}\n" for line in lines))


def test_each_line_is_answered(folder, plan):
    result = timed(folder, "{}", json.dumps({"plan": plan, "target": 5}))
    assert result.returncode == 0, result.stderr
    base, both = map(json.loads, result.stdout.splitlines())
    assert set(base) == {"base_ms"} and set(both) == {"base_ms", "ms"} and min(*base.values(), *both.values()) > 0
    assert both["base_ms"] == base["base_ms"]  # not long ago


def test_an_old_base_is_measured_again(monkeypatch):
    ms, now = iter(range(1, 9)), iter((0, 0, 19, 21, 22, 30))
    monkeypatch.setattr(time_plans, "measure", lambda *_: SimpleNamespace(ms_per_token=next(ms)))
    monkeypatch.setattr(time_plans, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(time_plans.hub, "set_compensation", lambda *_: None)
    timer = time_plans.PlanTimer(SimpleNamespace(decoder=None, settings_changed=lambda: None), 16, 200)
    assert [timer.answer("{}")["base_ms"] for _ in range(4)] == [1, 1, 2, 2]


@pytest.mark.parametrize(("line", "says"), [
    ("5", "stdin: expected lines such as"), ("not JSON", "stdin: expected lines such as"),
    ('{"plan": "no-such-plan.json"}', "no-such-plan.json: no such file")])
def test_other_lines_are_refused(folder, line, says):
    assert says in refused(timed(folder, line))


@pytest.mark.parametrize("name", ["--new-tokens", "--prompt-tokens"])
def test_a_number_of_tokens_below_one_is_refused(folder, monkeypatch, name):
    monkeypatch.setattr("sys.argv", ["time_plans.py", "--model", str(folder), name, "0"])
    with pytest.raises(UserError, match=f"{name}: expected a positive number"):
        time_plans.main()


@pytest.mark.parametrize("what", ["--model", "--random-weights"])
def test_a_device_that_is_not_there_is_refused(folder, what):
    name = folder if what == "--model" else "llama-3-8b"
    assert "got 'cuda:9'; use cpu" in refused(run_script(SCRIPT, what, name, "--device", "cuda:9", input="{}"))
