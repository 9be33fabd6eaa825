"""The script as a user runs it: text, JSON, chat, stdin, and what it refuses."""

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from decdec.errors import UserError
from decdec.testing import quick_folder, refused, run_script
from decdec.tiny import make_model
from generate import main

ROOM = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    original = make_model(tmp_path_factory.mktemp("generate") / "tiny")
    folder = quick_folder(LlamaForCausalLM.from_pretrained(original), original.parent / "tiny-w3")
    AutoTokenizer.from_pretrained(original).save_pretrained(folder)
    return original, folder


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


def test_json_says_what_ran(folders, generate):
    original, folder = folders
    row = json.loads(generate("--model", folder, "--prompt", "Hello", "--k-chunk", 16, "--json").out)
    assert (row["prompt_tokens"], row["k_chunk"], row["selection"]) == (5, 16, "bucket") and row["new_tokens"] <= 5
    assert row["prefill_tokens_per_s"] > 0 and row["device_bytes"] > 0 and row["host_bytes"] > 0
    full = json.loads(generate("--model", original, "--prompt", "Hello", "--json").out)
    assert full["host_bytes"] == 0 and full["device_bytes"] > row["device_bytes"] and full["selection"] == "none"


def test_stdin_chat_and_sampling_stream_the_same_text_for_the_same_seed(folders, generate):
    arguments = ("--model", folders[1], "--chat", "--temperature", 1, "--top-k", 50, "--seed", 4, "--k-chunk", 8)
    first, second = (generate(*arguments, stdin="Grüße") for _ in range(2))
    assert first.out == second.out and "tokens/s" in first.err
    assert generate("--model", folders[1], stdin="").err.startswith("prefill 1 tokens")  # of no prompt, the first token
    assert generate("--model", folders[1], "--prompt", "x" * 510).err.startswith("only 2 new tokens")


def test_shell_script_compares_settings(folders):
    result = run_script(ROOM / "generate.sh", folders[1], "Hello", 0, 8,
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
])
def test_mistakes_end_in_one_line(folders, monkeypatch, arguments, match):
    places = {"original": folders[0], "folder": folders[1], "room": ROOM}
    filled = [str(argument).format(**places) for argument in arguments]
    prompt = [] if {"--prompt", "--prompt-file"} & set(filled) else ["--prompt", "Hello"]
    monkeypatch.setattr("sys.argv", arguments_of(*filled, *prompt))
    with pytest.raises(UserError, match=re.escape(match)) as error:
        main()
    assert "\n" not in str(error.value)


def test_compensation_without_a_cheatsheet_is_refused(folders, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for file in folders[1].iterdir():
        if file.name != "cheatsheet.pt":
            (folder / file.name).symlink_to(file)
    assert "cheatsheet.pt" in refused(
        run_script(ROOM / "generate.py", "--model", folder, "--prompt", "Hello", "--k-chunk", 8))
