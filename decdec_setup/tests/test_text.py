"""Calibration text: of the hub by name, of local files, drawn by the seed and kept between runs."""

import pytest
import torch

from decdec import text
from decdec.errors import UserError
from decdec.models import load_tokenizer
from decdec.text import calibration_samples, load_text


def test_a_long_text_is_drawn_from_by_the_seed(tiny, monkeypatch):
    documents = tuple(f"{i:04d}" * 200 for i in range(100))
    tokenizer = load_tokenizer(str(tiny))
    whole = calibration_samples(text.Text("t", documents), tokenizer, 4, 16, 0)
    monkeypatch.setattr(text, "CALIBRATION_CHARACTERS", 3000)
    seen = []
    windows = text.windows
    monkeypatch.setattr(text, "windows", lambda source, *rest: seen.append(source) or windows(source, *rest))
    drawn = [calibration_samples(text.Text("t", documents), tokenizer, 4, 16, seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2]) and whole.shape == drawn[0].shape
    assert len(seen[0].documents) == 4 and set(seen[0].documents) < set(documents)


def test_drawn_samples_are_kept_by_tokenizer_text_and_settings(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("DECDEC_CACHE", str(tmp_path))
    drawn = []
    windows = text.windows
    monkeypatch.setattr(text, "windows", lambda *args: drawn.append(args[0].name) or windows(*args))
    one, other = (text.Text(name, (name * 500,)) for name in ("abc ", "xyz "))
    tokenizer, second = load_tokenizer(str(tiny)), load_tokenizer(str(tiny))
    second.add_tokens(["abc"])
    wanted = calibration_samples(one, tokenizer, 3, 16, 0)
    assert torch.equal(calibration_samples(one, tokenizer, 3, 16, 0), wanted) and drawn == ["abc "]
    for arguments in ((other, tokenizer, 3, 16, 0), (one, second, 3, 16, 0), (one, tokenizer, 2, 16, 0),
                      (one, tokenizer, 3, 15, 0), (one, tokenizer, 3, 16, 1)):
        calibration_samples(*arguments)
    assert len(drawn) == 6
    for file in (tmp_path / "calibration").iterdir():
        file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(calibration_samples(one, tokenizer, 3, 16, 0), wanted) and len(drawn) == 7
    monkeypatch.setenv("DECDEC_CACHE", "/proc/none")
    assert torch.equal(calibration_samples(one, tokenizer, 3, 16, 0), wanted) and len(drawn) == 8


def test_texts_of_the_hub_carry_their_revision_and_parts_are_disjoint(monkeypatch):
    import datasets

    asked = {}

    def load(repository, revision, **options):
        asked.update(repository=repository, revision=revision, **options)
        return {"text": [f"document {i}" for i in range(7)]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(text, "_revision", lambda repository: "0123456789abcdef" if "pile" in repository else None)
    calibration, evaluation = (load_text("pileval", part) for part in ("calibration", "evaluation"))
    assert asked["revision"] == "0123456789abcdef" and calibration.name == "pileval-calibration@0123456789ab"
    assert not set(calibration.documents) & set(evaluation.documents) and len(calibration.documents + evaluation.documents) == 7
    assert load_text("c4", "calibration").name == "c4-train-0"
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: 1 / 0)
    with pytest.raises(UserError, match="pileval could not be loaded from the hub"):
        load_text("pileval", "calibration")


@pytest.mark.parametrize("name, content, documents", [
    ("lines.jsonl", '{"text": "one\\ntwo"}\n\n{"text": "three\u2028more", "meta": 1}\n', ("one\ntwo", "three\u2028more")),
    ("wiki.raw", " = Title = \n \nSome words .\n", (" = Title = \n", "", "Some words .\n")),
    ("plain.md", "# Any\ntext, as it is\n", ("# Any\ntext, as it is\n",))])
def test_local_files_are_read_by_their_kind(tmp_path, name, content, documents):
    (tmp_path / name).write_text(content)
    found = load_text(str(tmp_path / name), "calibration")
    assert (found.name, found.documents) == (name, documents) and found.joined == "\n\n".join(documents)
    (tmp_path / name).write_text(content + content)
    assert load_text(str(tmp_path / name), "calibration").hash != found.hash


@pytest.mark.parametrize("name, content, message", [
    ("lines.jsonl", b'{"content": "no such field"}', "expected JSON lines with a field 'text'"),
    ("lines.jsonl", b"not JSON", "expected JSON lines with a field 'text'"),
    ("lines.jsonl", b"[1, 2]", "expected JSON lines with a field 'text'"),
    ("lines.jsonl", b'{"text": 5}', "expected JSON lines with a field 'text'"),
    ("latin.txt", "Grüße".encode("latin-1"), "expected UTF-8 text"),
    ("blank.txt", b" \n\n", "expected text, got an empty file"),
    (None, None, "expected one of wikitext, c4, pileval, pydoc or a file")])
def test_files_that_are_no_text_are_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_text(str(path), "calibration")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", ["", "\n"])
def test_every_line_of_a_raw_file_counts(tmp_path, end):
    path = tmp_path / "wiki.raw"
    path.write_text(" = A = \n \nthe last" + end)
    assert load_text(str(path), "evaluation").documents == (" = A = \n", "", "the last\n")


@pytest.mark.parametrize("numbers, says", [({"samples": 0}, "samples: expected 1"), ({"samples": -1}, "samples: expected 1"),
                                           ({"length": 0}, "length: expected 2"), ({"length": 1}, "length: expected 2")])
def test_numbers_that_leave_no_text_are_refused(numbers, says):
    with pytest.raises(UserError, match=says):
        calibration_samples(text.Text("some", ("words",)), None, **{"samples": 1, "length": 2, "seed": 0} | numbers)
    for wrong in ({"length": 1}, {"length": 2, "count": 0}, {"length": 2, "count": -1}):
        with pytest.raises(UserError, match="expected"):
            text.windows(text.Text("some", ("words",)), None, **wrong)
