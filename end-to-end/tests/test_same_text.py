"""The script that compares paths: they agree on a tiny model, and a text that differs is found with its gap."""

import json

import pytest
import torch

from decdec.errors import UserError
from decdec.linear import Compensation
from runtime import Runtime
from same_text import main, parting


def test_every_path_gives_the_same_text(folder, monkeypatch, capsys, tmp_path):
    rows = tmp_path / "rows.jsonl"
    monkeypatch.setattr("sys.argv", ["same_text.py", "--model", str(folder), "--max-new-tokens", "6", "--out",
                                     str(rows)])
    monkeypatch.setattr("same_text.default_device", lambda: "cpu")
    main()
    seen = [json.loads(line) for line in rows.read_text().splitlines()]
    assert rows.read_text() == capsys.readouterr().out
    assert {(row["path"], row["k_chunk"]) for row in seen} == {
        (path, k_chunk) for path in ("decoder cpu", "hugging face cpu") for k_chunk in (0, 16)}
    assert all(row["parts_at"] is None for row in seen)


def test_another_text_is_found_where_it_parts(folder):
    runtime, prompt = Runtime(folder, Compensation(8), "cpu"), torch.tensor([5, 6, 7])
    first = list(runtime.stream(prompt.tolist(), 5, stop=()))
    other = first[:3] + [(first[3] + 1) % 200, first[4]]
    found = parting(runtime, prompt, first, other)
    assert found["parts_at"] == 3 and found["gap"] > 0
    assert parting(runtime, prompt, first, first) == {"parts_at": None, "gap": None}


def test_a_number_of_tokens_below_one_is_refused(folder, monkeypatch):
    monkeypatch.setattr("sys.argv", ["same_text.py", "--model", str(folder), "--max-new-tokens", "0"])
    with pytest.raises(UserError, match="--max-new-tokens"):
        main()
