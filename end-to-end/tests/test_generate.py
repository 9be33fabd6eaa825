"""The script as a user runs it: text, JSON, chat, stdin, and what it refuses."""

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest

from decdec import artifacts
from decdec.errors import UserError
from decdec.plan import Choice, Device, Plan, Tuned, save_plan
from decdec.sizes import NAMED
from decdec.testing import refused, run_script
from generate import main

ROOM = Path(__file__).parents[1]


def arguments_of(*arguments):
    return ["generate.py", "--max-new-tokens", "5", *map(str, arguments)]


@pytest.fixture
def generate(monkeypatch, capsys):
    """Run the script's main in this process; returns what it printed."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr("sys.argv", arguments_of(*arguments))
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        main()
        return capsys.readouterr()

    return run


def test_json_says_what_ran(original, folder, generate):
    row = json.loads(generate("--model", folder, "--prompt", "Hello", "--k-chunk", 16, "--json").out)
    assert (row["prompt_tokens"], row["k_chunk"], row["selection"]) == (5, 16, "exact") and row["new_tokens"] <= 5
    assert row["prefill_tokens_per_s"] > 0 and row["device_bytes"] > 0 and row["host_bytes"] > 0
    full = json.loads(generate("--model", original, "--prompt", "Hello", "--json").out)
    assert full["host_bytes"] == 0 and full["device_bytes"] > row["device_bytes"] and full["selection"] == "none"


def test_stdin_chat_and_sampling_stream_the_same_text_for_the_same_seed(folder, generate):
    arguments = ("--model", folder, "--chat", "--temperature", 1, "--top-k", 50, "--seed", 4, "--k-chunk", 8)
    first, second = (generate(*arguments, stdin="Grüße") for _ in range(2))
    assert first.out == second.out and "tokens/s" in first.err
    assert generate("--model", folder, stdin="").err.startswith("prefill 1 tokens")  # of no prompt, the first token
    assert generate("--model", folder, "--prompt", "x" * 510).err.startswith("only 2 new tokens")
    assert generate("--model", folder, "--prompt", "x" * 6, "--context", 8).err.startswith("only 2 new tokens")


def test_a_file_of_prompts_is_answered_one_by_one(folder, generate, tmp_path):
    (tmp_path / "prompts.txt").write_text("Hello\u2028you\x0b\n\nGoodbye\n")  # no line ends but \n
    many = generate("--model", folder, "--prompts", tmp_path / "prompts.txt", "--json").out.splitlines()
    alone = [generate("--model", folder, "--prompt", prompt, "--json").out for prompt in ("Hello\u2028you\x0b", "Goodbye")]
    assert [json.loads(row)["text"] for row in many] == [json.loads(row)["text"] for row in alone]


def plan_for(folder, **changes):
    quant = artifacts.read_quant_config(folder)
    choices = tuple(Choice(kind, 3, 192, 192, 2, 4, k_chunk, 1.0, 1.0)
                    for kind, k_chunk in zip(("qkv", "o", "gu", "d"), (8, 16, 0, 4)))
    tuned = Tuned(5.0, "kernel", "paper", 4.0, None, 0.0, None, choices)
    whole = dict(model="tiny", method="rtn", weights_hash=quant.weights_hash, device=Device("A GPU", 20, True),
                 selection="exact", dram_gb_s=1.0, link_gb_s=1.0, gain_source=None, versions={}, tuned=(tuned,))
    return Plan(**whole | changes)


def test_a_plan_is_followed_and_one_of_another_model_refused(original, folder, generate, tmp_path):
    save_plan(tmp_path / "plan.json", plan_for(folder))
    arguments = ("--model", folder, "--prompt", "Hello", "--json", "--device", "cpu", "--plan")
    shown = generate(*arguments, tmp_path / "plan.json")
    row = json.loads(shown.out)
    assert (row["k_chunk"], row["n_tb"], row["selection"]) == ([8, 16, 0, 4], 4, "exact") and "following" in shown.err
    by_hand = generate("--model", folder, "--prompt", "Hello", "--json", "--k-chunk", 8, 16, 0, 4, "--device",
                       "cpu")
    assert json.loads(by_hand.out)["text"] == row["text"]
    save_plan(tmp_path / "other.json", plan_for(folder, weights_hash="0" * 16))
    with pytest.raises(UserError, match="tuned for weights 0000"):
        generate(*arguments, tmp_path / "other.json")
    with pytest.raises(UserError, match="leave one out"):
        generate(*arguments, tmp_path / "plan.json", "--k-chunk", 8)
    with pytest.raises(UserError, match="not a DecDEC folder"):
        generate("--model", original, "--prompt", "Hello", "--device", "cpu", "--plan", tmp_path / "plan.json")


def test_benchmark_and_profile_write_rows(folder, generate, tmp_path):
    rows = tmp_path / "rows.jsonl"
    shown = generate("--model", folder, "--benchmark", "--profile", "--sweep", 0, 8, "--runs", 2, "--out", rows,
                     "--prompt-tokens", 3, "--device", "cpu").out
    assert "us a token" in shown and "codebook_gemv" in shown and "in all" in shown
    seen = list(map(json.loads, rows.read_text().splitlines()))
    first, second = (row for row in seen if row["bench"] == "decode")
    profiles = [row for row in seen if row["bench"] == "profile"]
    assert {row["k_chunk"] for row in profiles} == {0, 8} and all(row["us_a_token"] > 0 < row["count"] for row in profiles)
    assert (first["k_chunk"], second["k_chunk"], second["bench"], second["bits"]) == (0, 8, "decode", 3.0)
    assert second["ms_per_token"] > 0 and second["tokens_per_s"] > 0 and second["pinned_bytes"] > 0
    assert (second["runs"], second["new_tokens"], second["prompt_tokens"]) == (2, 5, 3)


@pytest.mark.parametrize("form, bits", [("codebook", 3.5), ("uniform", 4)])
def test_random_weights_need_no_model(generate, monkeypatch, form, bits):
    monkeypatch.setitem(NAMED, "llama-3-8b", (256, 512, 2, 1, 2, 300))
    row = json.loads(generate("--random-weights", "llama-3-8b", "--format", form, "--bits", bits, "--benchmark",
                              "--runs", 1, "--k-chunk", 8, "--head-bits", 8, "--device", "cpu").out)
    assert (row["shapes"], row["bits"], row["k_chunk"], row["head_bits"]) == ("llama-3-8b", bits, 8, 8)


def test_flags_of_the_original_are_understood(folder, generate):
    new = generate("--model", folder, "--prompt", "Hello", "--max-new-tokens", 3, "--k-chunk", 8, 8, 8, 8,
                   "--temperature", 1, "--top-k", 5)
    old = generate("--checkpoint_path", folder, "--prompt", "Hello", "--max_new_tokens", 3, "--k_chunks", 8, 8, 8,
                   8, "--n_tbs", 2, 2, 2, 2, "--temperature", 1, "--top_k", 5)
    assert old.out == new.out
    for flag, match in (("--backend", "its own format"), ("--bitwidth", "its own bits"), ("--compile", "CUDA graph"),
                        ("--print_result", "always printed")):
        with pytest.raises(UserError, match=match):
            generate("--model", folder, flag)


def test_shell_script_compares_settings(folder):
    result = run_script(ROOM / "generate.sh", folder, "Hello", 0, 8,
                        env=os.environ | {"PYTHON": sys.executable, "MAX_NEW_TOKENS": "3"})
    assert result.returncode == 0, result.stderr
    assert "k_chunk 0" in result.stderr and "k_chunk 8" in result.stderr


@pytest.mark.parametrize("arguments, match", [
    (("--model", "{folder}", "--k-chunk", 1025), "0..1024"),
    (("--model", "{folder}", "--k-chunk", -1), "0..1024"),
    (("--model", "{original}", "--k-chunk", 8), "not a DecDEC folder"),
    (("--model", "{folder}/nothing"), "expected a model folder"),
    (("--model", "{room}"), "config.json"),
    (("--model", "{folder}", "--prompt", "x" * 600), "600 tokens, but the model's context is 512"),
    (("--model", "{folder}", "--prompt-file", "{folder}/nothing.txt"), "No such file"),
    (("--model", "{folder}", "--temperature", -1), "temperature"),
    (("--model", "{folder}", "--max-new-tokens", 0), "max-new-tokens"),
    (("--model", "{folder}", "--k-chunk", 8, 8), "expected one number, or 4"),
    (("--model", "{folder}", "--device", "cuda:9"), "torch sees"),
    (("--model", "{folder}", "--device", "gpu"), "expected cpu, cuda or cuda:NUMBER, got 'gpu'"),
    (("--model", "{folder}", "--prompts", "/dev/null"), "expected a prompt on every line"),
    (("--prompt", "Hello"), "--model: expected"),
    (("--benchmark",), "--model: expected a model to measure"),
    (("--model", "{folder}", "--random-weights", "llama-3-8b", "--benchmark"), "does not go with --model"),
    (("--random-weights", "llama-3-8b", "--benchmark", "--plan", "x"), "does not go with --plan"),
    (("--random-weights", "llama-3-8b", "--benchmark", "--repair"), "does not go with --repair"),
    (("--random-weights", "llama-3-8b"), "--random-weights: goes with --benchmark"),
    (("--model", "{folder}", "--out", "rows"), "--out: goes with --benchmark"),
    (("--model", "{folder}", "--benchmark", "--sweep", 0, "--plan", "x"), "--sweep: instead of --plan"),
    (("--model", "{folder}", "--benchmark", "--sweep", 0, "--k-chunk", 0), "--sweep: instead of --k-chunk"),
    (("--model", "{folder}", "--device", "cpu", "--target", 5), "--target: expected a plan"),
    (("--model", "{original}", "--repair"), "not a DecDEC folder"),
    (("--model", "{folder}", "--context", 0), "expected 1 to 512 tokens"),
    (("--model", "{folder}", "--context", 513), "expected 1 to 512 tokens"),
    (("--model", "{folder}", "--top-k", 10**20), "top_k"),
    (("--model", "{folder}", "--seed", 10**20), "seed"),
    (("--model", "{folder}", "--prompt", "\udcff"), "lone surrogate"),
    (("--model", "{folder}", "--prompt", "\udcff", "--chat"), "lone surrogate"),
    (("--model", "{folder}", "--benchmark", "--runs", 0), "--runs"),
])
def test_mistakes_end_in_one_line(original, folder, monkeypatch, arguments, match):
    places = {"original": original, "folder": folder, "room": ROOM}
    filled = [str(argument).format(**places) for argument in arguments]
    prompt = [] if {"--prompt", "--prompts", "--prompt-file"} & set(filled) else ["--prompt", "Hello"]
    monkeypatch.setattr("sys.argv", arguments_of(*filled, *prompt))
    with pytest.raises(UserError, match=re.escape(match)) as error:
        main()
    assert "\n" not in str(error.value)


def test_compensation_without_a_cheatsheet_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        if file.name != "cheatsheet.pt":
            (tmp_path / file.name).symlink_to(file)
    assert "cheatsheet.pt" in refused(
        run_script(ROOM / "generate.py", "--model", tmp_path, "--prompt", "Hello", "--k-chunk", 8))
