import argparse
import math
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from perplexity import KEY
from subject import SUBJECT_KEY, Rows, Setting, from_arguments

from decdec import artifacts, models, text
from decdec.files import read_rows
from decdec.testing import refused, run_script
from decdec.tiny import make_model

ROOT = Path(__file__).parents[2]
SHORT = ("--text", "pydoc", "--windows", 2, "--length", 64)


def measure(out, model, *arguments):
    return run_script(ROOT / "evaluation/perplexity.py", "--model", model, "--out", out, *SHORT, *arguments)


def rows_of(out, model, *arguments):
    result = measure(out, model, *arguments)
    assert result.returncode == 0, result.stderr
    return read_rows(out)


def test_full_precision_is_exp_of_the_models_own_loss(original, tmp_path):
    row, = rows_of(tmp_path / "rows.jsonl", original)
    ids = text.windows(text.load_text("pydoc", "evaluation"), models.load_tokenizer(str(original)), 64, 2)
    model = models.load_model(str(original), torch.float32)
    with torch.inference_mode():
        losses = [float(model(window[None], labels=window[None]).loss) for window in ids]
    assert row["perplexity"] == pytest.approx(math.exp(sum(losses) / 2), rel=1e-4)
    assert (row["method"], row["bits"], row["k_chunk"], row["host_bytes"]) == ("original", 16, 0, 0)


def test_everything_restored_is_full_precision(original, folder, tmp_path):
    out = tmp_path / "rows.jsonl"
    full, = rows_of(out, original)
    _, base, restored = rows_of(out, folder, "--cheatsheet", folder / "residual_16.pt", "--k-chunk", 0, 1024)
    assert abs(base["perplexity"] - full["perplexity"]) > 1e-3
    assert restored["perplexity"] == pytest.approx(full["perplexity"], rel=2e-4)
    assert (restored["residual_bits"], restored["compensated"]) == (16, "every position")
    assert restored["host_bytes"] > base["device_bytes"] > 0


def test_with_a_static_repair_everything_restored_is_full_precision_too(original, folder, tmp_path):
    out, remains = tmp_path / "rows.jsonl", tmp_path / "remains.pt"
    made = [("repair.py", folder, "--center", "on", "--text", "pydoc", "--samples", 4, "--length", 64),
            ("cheatsheet.py", folder, "--repaired", "--bits", 16, "--out", remains)]
    for script, *arguments in made:
        result = run_script(ROOT / "decdec_setup" / script, *arguments)
        assert result.returncode == 0, result.stderr
    full, = rows_of(out, original)
    rows_of(out, folder)  # is another measurement than that with the repair
    _, base, repaired, restored = rows_of(out, folder, "--repair", "--cheatsheet", remains, "--k-chunk", 0, 1024, "--selection", "exact")
    assert restored["perplexity"] == pytest.approx(full["perplexity"], rel=2e-4)
    assert base["repair"] is None and repaired["repair"] == restored["repair"] is not None
    assert abs(repaired["perplexity"] - base["perplexity"]) > 1e-3 and repaired["device_bytes"] > base["device_bytes"]
    (folder / "repair.pt").unlink()
    assert "repair.pt: no such file" in refused(measure(out, folder, "--repair"))
    assert "--repair" in refused(measure(out, original, "--repair"))


def test_a_setting_is_measured_once(folder, tmp_path):
    out = tmp_path / "rows.jsonl"
    first = rows_of(out, folder, "--k-chunk", 0, 8)
    again = rows_of(out, folder, "--k-chunk", 0, 8, 16)
    assert [row["k_chunk"] for row in again] == [0, 8, 16]
    assert again[:2] == first


def test_killed_at_any_time_it_goes_on_where_it_was(folder, tmp_path):
    """Killed when its first row is there, and again later: nothing is lost, nothing is there twice, nothing differs."""
    out, arguments = tmp_path / "rows.jsonl", ("--k-chunk", *range(0, 40, 4))
    command = [sys.executable, ROOT / "evaluation/perplexity.py", "--model", folder, "--out", out, *SHORT, *arguments]
    for rows in (1, 3):
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(read_rows(out)) < rows:
                time.sleep(0.002)
            process.kill()
    assert 3 <= len(read_rows(out)) < 10
    assert len(rows_of(out, folder, *arguments)) == 10
    for killed, whole in zip(read_rows(out), rows_of(tmp_path / "whole.jsonl", folder, *arguments), strict=True):
        assert killed | {"seconds": 0} == whole | {"seconds": 0}


def test_selections_differ_and_say_so(folder, tmp_path):
    rows = rows_of(tmp_path / "rows.jsonl", folder, "--k-chunk", 16, "--selection", "bucket", "exact", "static", "random")
    assert [row["selection"] for row in rows] == ["bucket", "exact", "static", "random"]
    assert len({row["perplexity"] for row in rows}) == 4


@pytest.mark.parametrize(("arguments", "message"), [
    (("--k-chunk", "-1"), "--k-chunk: expected 0..1024, got -1"),
    (("--k-chunk", "1025"), "--k-chunk: expected 0..1024, got 1025"),
    (("--text", "no-such-file.txt"), "got 'no-such-file.txt'"),
    (("--windows", "100000"), "windows of 64 need"),
    (("--windows", "0"), "windows: expected 1 or more, got 0"),
    (("--length", "0"), "length: expected 2 or more, got 0"),
    (("--device", "gpu"), "device: expected cpu, cuda"),
    (("--cheatsheet", "no-such-file.pt", "--k-chunk", "8"), "no-such-file.pt: no such file"),
])
def test_bad_input_ends_in_one_line(folder, tmp_path, arguments, message):
    out = tmp_path / "rows.jsonl"
    assert message in refused(measure(out, folder, *arguments))
    assert list(tmp_path.iterdir()) == []


def test_rows_tell_originals_and_calibrations_apart_that_share_a_name(original, folder, tmp_path, monkeypatch):
    def key(source, *settings):
        subject = from_arguments(argparse.Namespace(model=str(source), cheatsheet=None, dtype=None, device="cpu", seed=0))
        return [{name: row[name] for name in SUBJECT_KEY} for row in subject.compensated_rows("perplexity", list(settings))]

    other = make_model(tmp_path / original.name, seed=1)
    (mine,), (another,) = key(original, Setting()), key(other, Setting())
    assert mine["model"] == another["model"] and mine["weights_hash"] != another["weights_hash"]
    link = tmp_path / "link"
    link.symlink_to(original)
    assert key(link, Setting())[0]["model"] == "link"  # as the hub's snapshots are links to files of other names
    monkeypatch.chdir(original)
    assert key(".", Setting()) == [mine]
    recalibrated = tmp_path / folder.name
    shutil.copytree(folder, recalibrated)
    quant = artifacts.read_quant_config(folder)
    thresholds = artifacts.load_thresholds(folder / artifacts.THRESHOLDS, quant)
    settings = [Setting(), *(Setting(selection, 8) for selection in ("bucket", "exact", "static"))]
    for change, same in (({"text": "another name"}, [True] * 4), ({"seed": 1}, [True, False, True, False])):
        changed = replace(thresholds, calibration=thresholds.calibration | change)
        artifacts.save_thresholds(recalibrated / artifacts.THRESHOLDS, changed, quant)
        names = ("weights_hash", "selection", "thresholds")
        pairs = zip(key(folder, *settings), key(recalibrated, *settings), strict=True)
        assert [all(a[name] == b[name] for name in names) for a, b in pairs] == same


def test_published_rows_are_found_by_what_is_asked_for_today():
    path = ROOT / "evaluation/results/smollm2-135m.jsonl"
    rows, published = Rows(path, KEY), read_rows(path)
    assert len(published) > 90
    for row in published:
        today = row | {"thresholds": "t" if row["selection"] in ("bucket", "static") else None}
        today |= {"weights_hash": "w"} if row["method"] == "original" else {}
        assert rows.find(today)["perplexity"] == row["perplexity"]
        assert rows.find(today | {"text_hash": "other"}) is None
        assert row["method"] == "original" or rows.find(today | {"weights_hash": "other"}) is None


def test_rows_of_today_are_told_apart_by_thresholds(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl", KEY)
    row = {"method": "awq", "selection": "bucket", "k_chunk": 8, "thresholds": "t"}
    rows.append(row)
    assert rows.find(row) is row and rows.find(row | {"thresholds": "other"}) is None


def test_an_original_model_cannot_be_compensated(original, tmp_path):
    assert "is not a DecDEC folder" in refused(measure(tmp_path / "rows.jsonl", original, "--k-chunk", 8))


def test_a_folder_that_is_no_model(tmp_path):
    assert "expected a model folder" in refused(measure(tmp_path / "rows.jsonl", tmp_path))


def test_artifacts_of_other_weights_are_refused(original, folder, tmp_path):
    other = tmp_path / "other"
    result = run_script(ROOT / "decdec_setup/quantize.py", "--model", original, "--method", "rtn", "--bits", 2, "--out", other,
                 "--text", "pydoc", "--samples", 4, "--length", 64)
    assert result.returncode == 0, result.stderr
    message = refused(measure(tmp_path / "rows.jsonl", other, "--k-chunk", 8, "--cheatsheet", folder / "cheatsheet.pt"))
    assert "made for weights" in message


def test_a_truncated_cheatsheet_is_refused(folder, tmp_path):
    cut = tmp_path / "cut.pt"
    cut.write_bytes((folder / "cheatsheet.pt").read_bytes()[:5000])
    assert "cannot be read" in refused(measure(tmp_path / "rows.jsonl", folder, "--k-chunk", 8, "--cheatsheet", cut))
