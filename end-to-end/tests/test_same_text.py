"""The script that compares paths: they agree on a tiny model, and a text that differs is judged."""

import json
import shutil
from functools import partial

import pytest
import torch

from decdec.errors import UserError
from decdec.linear import Compensation
from decdec.testing import add_repair
from runtime import Runtime
from same_text import CHANNEL_TIE, LOGITS, NO_TIE, SAME, SELECTION, TIE, main, parting, selected_by_decoder


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


@pytest.mark.parametrize("repair", [False, True])
def test_another_text_is_judged_where_it_parts(folder, repair, monkeypatch, tmp_path):
    if repair:
        folder = add_repair(shutil.copytree(folder, tmp_path / "m"))
    judge, other = (Runtime(folder, Compensation(16, selection, repair=repair), "cpu") for selection in ("exact", "static"))
    for prompt in torch.randint(200, (40, 6), generator=torch.Generator().manual_seed(0)):
        first, text = (list(runtime.stream(prompt.tolist(), 25, stop=())) for runtime in (judge, other))
        judged = partial(parting, judge.decoder, prompt, first, reread=partial(selected_by_decoder, other.decoder))
        found = judged(text)
        if (found["gap"] or 0) > TIE and found["parts_at"]:
            break
    assert judged(first)["verdict"] == SAME
    # What was selected otherwise explains another text, if those channels were a tie.
    at = found["parts_at"]
    assert found["gap"] > TIE > 1e-4 > found["gap_replayed"]
    assert found["selections"] == at * 8 >= found["tipped"] > 0 and found["widest"] > CHANNEL_TIE
    assert found["verdict"] == NO_TIE
    monkeypatch.setattr("same_text.CHANNEL_TIE", 1.1)
    assert judged(text)["verdict"] == SELECTION
    # A token that no selection explains is wrong whatever was selected.
    wrong = judged([*first[:at], (text[at] + 1) % 200])
    assert wrong["verdict"] == NO_TIE and wrong["gap_replayed"] > TIE
    monkeypatch.setattr("same_text.TIE", found["gap"] + 1e-3)
    assert judged(text)["verdict"] == LOGITS


def test_a_wrong_text_ends_in_an_error(folder, monkeypatch):
    monkeypatch.setattr("sys.argv", ["same_text.py", "--model", str(folder), "--max-new-tokens", "2", "--k-chunk", "16"])
    monkeypatch.setattr("same_text.default_device", lambda: "cpu")
    stream = Runtime.stream
    monkeypatch.setattr(Runtime, "stream", lambda *text, **options: [token ^ 1 for token in stream(*text, **options)])
    with pytest.raises(UserError, match="up to a tie, got another from hugging face cpu at k_chunk 16 after 'The three"):
        main()


def test_an_original_is_refused(original, monkeypatch):
    monkeypatch.setattr("sys.argv", ["same_text.py", "--model", str(original), "--k-chunk", "0"])
    with pytest.raises(UserError, match="not a DecDEC folder"):
        main()


def test_a_number_of_tokens_below_one_is_refused(folder, monkeypatch):
    monkeypatch.setattr("sys.argv", ["same_text.py", "--model", str(folder), "--max-new-tokens", "0"])
    with pytest.raises(UserError, match="--max-new-tokens"):
        main()
