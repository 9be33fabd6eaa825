import pytest
import torch

from decdec.artifacts import QuantConfig, load_cheatsheet, load_thresholds, read_quant_config
from decdec.files import append_row
from decdec.models import decoder_linears, load_model, load_tokenizer
from decdec.testing import refused, run_script
from decdec.text import calibration_samples, load_text

import describe
from cheatsheet import make_cheatsheet
from model_card import quantize_command
from quantized_blocks import QuantizedBlocks
from scaling import read_scaling, scale_model
from thresholds import make_thresholds


@pytest.fixture(scope="module")
def finished(quantized, calibration):
    folder = quantized("awq")
    make_cheatsheet(folder)
    make_thresholds(folder, **calibration)
    return folder


@pytest.mark.parametrize("calibration, command", [
    ({"text": "c4_mine.txt"}, "--text c4_mine.txt "), ({"text": "c4-train-0@0123abcd"}, "--text c4 "),
    ({"text": "c4-train-0"}, "--text c4 "), ({"text": "wikitext2-train"}, "--text wikitext "),
    ({"text": "pydoc-3.12.3-calibration"}, "--text pydoc "), ({"text": "pileval-calibration@0a"}, "--text pileval "),
    ({"imported_from": "that"}, "import_checkpoint.py that FOLDER"),
    ({"imported_from": "that", "original": "h"}, "import_checkpoint.py that FOLDER --model this")])
def test_the_card_tells_the_command(calibration, command):
    numbers = {"samples": 1, "length": 2, "seed": 3} if "text" in calibration else {}
    quant = QuantConfig("awq", "uniform", 3, 64, "this", "w", calibration | numbers)
    assert command in quantize_command(quant) and (numbers or quantize_command(quant).endswith(command))


def test_the_predicted_output_error_weighs_rows_by_their_inputs(finished):
    quant = read_quant_config(finished)
    seen = load_thresholds(finished / "thresholds.pt", quant)
    kinds, _ = describe.collect(finished, quant)
    layers = [name for name in seen.row_energy if name.endswith("down_proj")]
    (of_d,) = (found for key, found in kinds.items() if key[0] == "d")
    assert of_d.error == pytest.approx(sum(float(seen.mean_square[name].double() @ seen.row_energy[name].double()) for name in layers))
    assert of_d.output == pytest.approx(sum(float(seen.output_energy[name]) for name in layers))


@torch.no_grad()
def test_stored_statistics_are_those_of_the_scaled_model(tiny, finished, calibration):
    quant = read_quant_config(finished)
    seen = load_thresholds(finished / "thresholds.pt", quant)
    sheet = load_cheatsheet(finished / "cheatsheet.pt", quant)
    model = scale_model(load_model(str(tiny), torch.float32), read_scaling(finished))
    tokens = calibration_samples(load_text("pydoc", "calibration"), load_tokenizer(str(tiny)), 3, 64, 0)
    outputs = {name: [] for name in decoder_linears(model)}
    for name, module in decoder_linears(model).items():
        module.register_forward_hook(lambda module, args, output, seen=outputs[name]: seen.append(output.flatten(0, 1)))
    model(tokens)
    for name, module in decoder_linears(model).items():
        residual = module.weight - QuantizedBlocks(finished).weight(name, module.weight.shape)
        torch.testing.assert_close(seen.row_energy[name], residual.square().sum(0), rtol=1e-2, atol=1e-6)
        expected = torch.cat(outputs[name]).square().sum(1).mean()
        torch.testing.assert_close(seen.output_energy[name], expected, rtol=2e-2, atol=1e-6)
        weight, whole, left = sheet.norms[name]
        assert weight == pytest.approx(float(module.weight.norm()), rel=1e-3)
        assert whole == pytest.approx(float(residual.norm()), rel=1e-2) and left < 0.3 * whole


def test_the_table_holds_every_byte_and_the_card_the_perplexity(finished, tmp_path):
    quant = read_quant_config(finished)
    kinds, rest = describe.collect(finished, quant)
    sheet = load_cheatsheet(finished / "cheatsheet.pt", quant)
    assert {key[0] for key in kinds} == {"qkv", "o", "gu", "d"} and sum(kind.layers for kind in kinds.values()) == 14
    scales = sum(scale.nbytes for scale in sheet.scale.values())
    held = sum(kind.device_bytes for kind in kinds.values()) + rest - scales
    header = 100_000
    assert 0 <= (finished / "model.safetensors").stat().st_size - held < header
    assert sum(kind.host_bytes for kind in kinds.values()) == sum(rows.nbytes for rows in sheet.residual.values())
    assert ("d", 192, 1088, 3) in kinds
    rows = tmp_path / "rows.jsonl"
    append_row(rows, {"weights_hash": quant.weights_hash, "text": "some", "windows": 2, "window_length": 8, "k_chunk": 16,
                      "perplexity": 12.3456})
    append_row(rows, {"weights_hash": "other", "perplexity": 99.0})
    done = run_script(describe.__file__, finished, "--card", "--results", rows)
    assert done.returncode == 0, done.stderr
    assert "gu " in done.stdout and "% " in done.stdout
    content = (finished / "README.md").read_text()
    assert "| some | 2 x 8 | 16 | 12.346 |" in content and "99.000" not in content and "base_model: tiny" in content
    assert "--method awq --bits 3 --group-size 64 --text pydoc --samples 3 --length 64 --seed 0" in content


def test_rows_without_a_card_are_refused(finished, tmp_path):
    assert "results: expected with --card" in refused(run_script(describe.__file__, finished, "--results", tmp_path / "rows.jsonl"))
