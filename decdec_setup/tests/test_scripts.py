import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from decdec.artifacts import read_quant_config
from decdec.errors import UserError
from decdec.files import read_rows
from decdec.models import decoder_linears, load_model
from decdec.original import save_original_thresholds
from decdec.testing import run_script

from benchmark_quantize import scaled
from cheatsheet import make_cheatsheet, make_from_two_folders
from parts import Parts
from quantize import quantize
from thresholds import make_thresholds

ROOM = Path(__file__).parents[1]


@pytest.mark.parametrize("method", ["squeezellm", "awq"])
def test_an_interrupted_run_goes_on_and_ends_the_same(calibration, tiny, quantized, tmp_path, monkeypatch, method):
    out = tmp_path / "out"
    save = Parts.save

    def save_one(self, block, tensors):
        if any(self.has(i) for i in range(2)):
            raise KeyboardInterrupt
        save(self, block, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "save", save_one)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(tiny), method, 3, str(out), **calibration)
    assert not (out / "config.json").exists() and len(list((out / ".parts").iterdir())) == 1
    saved = []
    monkeypatch.setattr(Parts, "save", lambda self, block, tensors: (saved.append(block), save(self, block, tensors)))
    assert quantize(str(tiny), method, 3, str(out), **calibration)
    assert len(saved) == 1
    assert read_quant_config(out).weights_hash == read_quant_config(quantized(method)).weights_hash
    assert not quantize(str(tiny), method, 3, str(out), **calibration) and not (out / ".parts").exists()


def test_another_quantization_takes_the_folders_place(tiny, tmp_path):
    out = tmp_path / "out"
    for bits in (3, 2):
        assert quantize(str(tiny), "rtn", bits, str(out)) and not quantize(str(tiny), "rtn", bits, str(out))
        assert read_quant_config(out).bits == bits


@pytest.mark.parametrize("method", ["squeezellm", "awq", "rtn"])
def test_the_folder_holds_every_tensor_once(tiny, quantized, method):
    folder = quantized(method)
    tensors = load_file(folder / "model.safetensors")
    model = load_model(str(tiny))
    layers = set(decoder_linears(model))
    packed = {"squeezellm": ("qweight", "codebook", "scale")}.get(method, ("qweight", "scales", "zeros"))
    rest = {name for name in model.state_dict() if name.removesuffix(".weight") not in layers} - {"lm_head.weight"}
    assert set(tensors) == rest | {f"{layer}.{part}" for layer in layers for part in packed}
    assert (folder / "tokenizer.json").is_file() and not list(folder.glob(".*"))
    quant = read_quant_config(folder)
    assert (quant.method, quant.bits, quant.base_model) == (method, 3, "../tiny")
    assert quant.format == ("codebook" if method == "squeezellm" else "uniform")


@pytest.mark.parametrize("change,message", [
    ({"bits": 5}, "bits: expected one of"), ({"bits": float("nan")}, "bits: expected one of"), ({"device": "gpu"}, "device: expected cpu"),
    ({"group_size": 0, "method": "rtn"}, "group-size: expected a divisor"), ({"method": "gguf"}, "method: expected one of"),
    ({"source": "nowhere/there/here"}, "model: expected a model folder"), ({"samples": 0}, "samples: expected"),
    ({"samples": 10**6}, "windows of 64 tokens"), ({"text": "missing.txt"}, "text: expected one of"),
    ({"group_size": 7, "method": "awq"}, "group-size: expected a divisor"), ({"group_size": 64}, "group-size: expected none")])
def test_mistakes_in_quantize_are_told_and_leave_nothing(calibration, tiny, tmp_path, change, message):
    arguments = {"source": str(tiny), "method": "squeezellm", "bits": 3, "out": str(tmp_path / "out")} | calibration | change
    with pytest.raises(UserError, match=message) as caught:
        quantize(**arguments)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_truncated_model_is_told(tiny, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be read"):
        quantize(str(broken), "rtn", 3, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_mistakes_in_cheatsheet_and_thresholds_are_told(calibration, tiny, quantized, tmp_path):
    folder, out = quantized("squeezellm"), tmp_path / "out.pt"
    for arguments, message in [({"bits": 3}, "bits: expected"), ({"nested": True, "bits": 8}, "for nested residuals, got 8"),
                               ({"bits": 8, "layout": "original"}, "layout: "), ({"layout": "x"}, "layout: expected one of"),
                               ({"model": "no/such/model"}, "model: expected")]:
        with pytest.raises(UserError, match=message):
            make_cheatsheet(folder, out=out, **arguments)
    with pytest.raises(UserError, match="without quantization_config"):
        make_cheatsheet(tiny, out=out)
    with pytest.raises(UserError, match="without quantization_config"):
        make_thresholds(tiny, out=out, **calibration)
    with pytest.raises(UserError, match="windows of 64"):
        make_thresholds(folder, out=out, **calibration | {"samples": 10**6})
    with pytest.raises(UserError, match="expected a model folder"):
        make_from_two_folders(str(tiny), str(tmp_path), out)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:20000])
    with pytest.raises(UserError, match="expected the packed weights"):
        make_cheatsheet(broken, model=str(tiny), out=out)
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(content, file):
        file.write(bytes(100))
        raise RuntimeError("unexpected pos 128 vs 0")  # all that torch says of it

    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="No space left"):
        save_original_thresholds(tmp_path / "thresholds.pt", {"model.layers.0.a": torch.ones(2)}, "model.layers")
    assert not list(tmp_path.iterdir())


def test_setup_makes_the_folder_and_a_mistake_is_one_line(tiny, tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OMP_NUM_THREADS": "2",
                   "PYTHONPATH": str(Path(torch.__file__).parents[1])}

    def setup(*arguments):
        return subprocess.run([ROOM / "setup.sh", *arguments], env=environment, capture_output=True, text=True, cwd=tmp_path)

    calibration = ("--text", "pydoc", "--samples", "2", "--length", "32")
    done = setup(str(tiny), "rtn", "4", "made", *calibration)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("made: ") and done.stdout.rstrip().endswith(" seconds in all")
    assert {"config.json", "model.safetensors", "cheatsheet.pt", "thresholds.pt"} <= {path.name for path in (tmp_path / "made").iterdir()}
    failed = setup(str(tiny), "rtn", "7", "other", *calibration)
    assert failed.returncode == 1 and failed.stderr.strip().splitlines() == ["error: bits: expected one of (2, 3, 4), got 7"]
    assert not (tmp_path / "other").exists()
    assert setup("only").returncode == 2


def test_compare_measures_every_bit_width_once(tiny, tmp_path):
    environment = {"METHODS": "rtn", "SAMPLES": "2", "LENGTH": "32", "WINDOWS": "2", "WINDOW_LENGTH": "32"}
    arguments = (tiny, "pydoc", "pydoc", tmp_path / "rows.jsonl", tmp_path / "folders")
    done = run_script(ROOM / "compare.sh", *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [(row["method"], row["bits"]) for row in rows] == [("original", 16), ("rtn", 3), ("rtn", 4), ("rtn", [3, 4])]
    assert all(row["windows"] == 2 and row["window_length"] == 32 for row in rows) and "selection" in done.stdout
    assert run_script(ROOM / "compare.sh", "only").returncode == 2


def test_the_benchmark_scales_to_the_whole_model(tmp_path):
    done = run_script(ROOM / "benchmark_quantize.py", "--random-weights", "tiny", "--blocks", "1", "2", "--samples", "2", "--length", "32",
                      "--steps", "squeezellm", "thresholds", "--device", "cpu", "--scratch", tmp_path, "--out", tmp_path / "rows.jsonl")
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["step"] for row in rows] == ["squeezellm", "thresholds"]
    assert all(row["model_blocks"] == 4 and row["model_gb"] < row["peak_host_gb"][1] < 8 for row in rows)
    assert "error: blocks: expected" in run_script(ROOM / "benchmark_quantize.py", "--blocks", "2", "2").stderr


def test_the_benchmark_of_the_search_finds_no_difference():
    done = run_script(ROOM / "benchmark_cheatsheet.py", "--d-out", "40", "--d-in", "300")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["d_out"], row["rows_that_differ"]) == (40, 0) and row["vectorised_s"] < row["rows_one_by_one_s"]


@pytest.mark.parametrize("step, blocks, found, seconds, gigabytes", [
    ("awq", [1, 3], [(5, 2.0, 0), (9, 3.0, 0)], 5 + 3 * 2, 3.5), ("awq", [4], [(8, 3.0, 0)], 8, 3.0),
    ("cheatsheet", [1, 3], [(5, 3.0, 0), (9, 3.1, 0)], 5 + 3 * 2, 3.1 + 0.25),  # a quarter of a gigabyte a block
    # Of 2 GB each, one input waits in a model of one block, two in one of two, three in one of four: 2, and 2 + 1 between.
    ("squeezellm", [1, 2], [(5, 3.0, 0), (7, 5.5, 0)], 5 + 3 * 2, 1.5 + 2 * 0.5 + 3 * 2)])
def test_a_row_of_the_benchmark(step, blocks, found, seconds, gigabytes):
    args = SimpleNamespace(random_weights="tiny", blocks=blocks, bits=3, samples=78125, length=50, device="cpu")
    row = scaled(args, step, found, 10**9, 2 * 10**9)
    assert row["seconds_a_block"] == 2 and row["model_minutes_scaled"] == pytest.approx(seconds / 60, abs=0.01)
    assert row["model_peak_host_gb_scaled"] == gigabytes and row["model_gb"] == 6
