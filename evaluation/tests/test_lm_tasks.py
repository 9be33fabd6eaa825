import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decdec_lm import DecDECLM
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_tasks import KEY, find_all
from local_tasks import write_tasks
from subject import Rows

from decdec import hub
from decdec.files import read_rows
from decdec.linear import Compensation
from decdec.testing import refused, run_script

EVALUATION = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(folder):
    return DecDECLM(str(folder), k_chunk=16, device="cpu")


def ask(model, kind, *arguments):
    request = Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("task", 0, 1))
    return getattr(model, kind)([request], disable_tqdm=True)[0]


def test_it_is_registered_with_lm_eval():
    assert get_model("decdec") is DecDECLM


def test_scored_tokens_are_compensated_at_every_position(model, folder):
    context, continuation = "The cat sat on the", " mat"
    value, _ = ask(model, "loglikelihood", context, continuation)
    plain = hub.load(folder, compensation=Compensation(k_chunk=16, prefill=True))
    ids = torch.tensor([model.tok_encode(context + continuation)])
    with torch.inference_mode():
        scores = plain(ids).logits.float().log_softmax(-1)[0]
    expected = sum(float(scores[position - 1, ids[0, position]]) for position in range(len(context), ids.shape[1]))
    assert value == pytest.approx(expected, rel=1e-4)
    model.compensate(Compensation())
    assert abs(ask(model, "loglikelihood", context, continuation)[0] - value) > 1e-4
    model.compensate(Compensation(k_chunk=16))


@pytest.mark.parametrize("compensate_prompt", [False, True])
def test_prompts_are_compensated_only_when_asked(model, compensate_prompt):
    model.compensate(Compensation(k_chunk=16), compensate_prompt)
    seen = []
    layer = next(iter(hub.compensated_layers(model.model).values()))
    handle = layer.register_forward_pre_hook(lambda layer, inputs: seen.append((inputs[0].shape[1], layer.compensation)))
    ask(model, "generate_until", "One two", {"until": [], "max_gen_toks": 3})
    handle.remove()
    assert seen[0] == (7, Compensation(k_chunk=16, prefill=compensate_prompt))
    assert [positions for positions, _ in seen[1:]] == [1, 1] and all(setting.k_chunk == 16 for _, setting in seen)
    model.compensate(Compensation(k_chunk=16))


def test_local_tasks_keep_lm_evals_definitions(data, tmp_path):
    names = write_tasks(data, tmp_path)
    assert names == ["bbh_cot_fewshot_boolean_expressions", "bbh_cot_fewshot_navigate", "lambada_openai", "piqa", "wikitext"]
    pages = [json.loads(line)["page"] for line in (tmp_path / "wikitext_pages.jsonl").read_text().splitlines()]
    assert pages == [" = A page = \n \n Some words . \n", " = Another = \n \n More words . \n"]


def run_tasks(folder, data, out, *arguments):
    return run_script(EVALUATION / "lm_tasks.py", "--model", folder, "--data", data, "--out", out, *arguments)


def test_every_local_task_runs_once(folder, data, tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = ("--tasks", "*", "--k-chunk", 0, 16, "--max-gen-toks", 2)
    result = run_tasks(folder, data, out, *arguments)
    assert result.returncode == 0, result.stderr
    rows = read_rows(out)
    metrics = {(row["task"], row["metric"]) for row in rows}
    assert {("piqa", "acc"), ("lambada_openai", "perplexity"), ("wikitext", "word_perplexity"),
            ("bbh_cot_fewshot_navigate", "exact_match")} <= metrics and len(rows) == 2 * len(metrics)
    assert all(row["task_version"] and row["n"] for row in rows)
    assert {row["compensated"] for row in rows if row["k_chunk"] and not row["task"].startswith("bbh")} == {"every position"}
    assert run_tasks(folder, data, out, *arguments).returncode == 0
    assert read_rows(out) == rows


def test_rows_say_when_prompts_were_compensated(folder, data, tmp_path):
    out = tmp_path / "rows.jsonl"
    for extra in ((), ("--compensate-prompt",)):
        result = run_tasks(folder, data, out, "--tasks", "bbh_cot_fewshot_navigate", "--k-chunk", 0, 16, "--max-gen-toks", 2, *extra)
        assert result.returncode == 0, result.stderr
    assert [row["compensated"] for row in read_rows(out)] == ["none", "generated tokens", "every position"]


def test_published_rows_are_found_by_what_is_asked_for_today():
    path = EVALUATION / "results/smollm2-135m/lm_tasks.jsonl"
    rows = Rows(path, KEY)
    for row in read_rows(path):
        today = row | {"thresholds": "t" if row["selection"] == "bucket" else None}
        today |= {"weights_hash": "w"} if row["method"] == "original" else {}
        assert row in find_all(rows, today) and not find_all(rows, today | {"limit": 12345})


def test_two_processes_measure_what_one_does(folder, tmp_path):
    lines = [{"query": f"Question: What is {n} and 1?\n", "choices": [str(n), str(n + 1)], "gold": n % 2} for n in range(5)]
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/piqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = []
    for launch in ((), ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")):
        out = tmp_path / f"rows{len(rows)}.jsonl"
        command = [sys.executable, *launch, EVALUATION / "lm_tasks.py", "--model", folder, "--data", tmp_path, "--tasks", "piqa",
                   "--k-chunk", "0", "16", "--out", out]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        rows.append([{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(out)])
    assert len(rows[0]) == 4 and {row["n"] for row in rows[0]} == {5}
    assert rows[1] == rows[0]


@pytest.mark.parametrize(("arguments", "message"), [
    (("--tasks", "no_such_task"), "--tasks: no task is called 'no_such_task'"),
    (("--tasks", "piqa", "--limit", "0"), "--limit: expected a positive number, got 0"),
    (("--tasks", "piqa", "--data", "no-such-folder"), "--data: expected a folder with bbh/"),
])
def test_bad_input_ends_in_one_line(folder, data, tmp_path, arguments, message):
    assert message in refused(run_tasks(folder, data, tmp_path / "rows.jsonl", *arguments))
    assert list(tmp_path.iterdir()) == []
