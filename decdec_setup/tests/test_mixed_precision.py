import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from decdec import hub
from decdec.artifacts import read_quant_config
from decdec.errors import UserError
from decdec.models import load_model, load_tokenizer
from decdec.testing import run_script
from decdec.text import calibration_samples, load_text

import mixed_precision
from blocks import BlockRunner
from describe import describe
from folder import Reusable
from mixed_precision import choose, make_bit_map
from quantize import quantize

ROOM = Path(__file__).parents[1]


def test_the_upper_half_by_difference_gets_the_high_bits():
    found = torch.tensor([[5.0, 1.0], [9.0, 8.5], [3.0, 0.1], [2.0, 1.5], [0.2, 0.1]])
    assert choose(found, 3, 4) == [4, 3, 4, 3, 3]


@pytest.mark.parametrize("method", ["awq", "squeezellm"])
def test_divergence_is_that_of_the_model_with_one_block_replaced(tiny, quantized, calibration, tmp_path, monkeypatch, method):
    arguments = str(tiny), quantized(method), quantized(method, 4), tmp_path / "map.json"
    chosen = make_bit_map(*arguments, **calibration)
    content = json.loads((tmp_path / "map.json").read_text())
    tokens = calibration_samples(load_text("pydoc", "calibration"), load_tokenizer(str(tiny)), 3, 64, 0)
    model, replaced = load_model(str(tiny), torch.float32), hub.load(quantized(method))
    with torch.no_grad():
        wanted = model(tokens).logits.log_softmax(-1)
        own = model.model.layers[1]
        model.model.layers[1] = replaced.model.layers[1]
        found = F.kl_div(model(tokens).logits.log_softmax(-1), wanted, log_target=True, reduction="none").sum(-1).mean()
        model.model.layers[1] = own
    assert content["divergence"]["3"][1] == pytest.approx(float(found), rel=0.05)
    assert sorted(content["bits"]) == [3, 4] and chosen == content["bits"]
    monkeypatch.setattr(mixed_precision, "divergences", lambda *_: pytest.fail("computed again"))
    assert make_bit_map(*arguments, **calibration) == chosen
    with pytest.raises(pytest.fail.Exception):
        make_bit_map(*arguments, **calibration | {"seed": 1})


def test_an_interrupted_map_goes_on_where_it_was_saved(tiny, quantized, calibration, tmp_path, monkeypatch):
    arguments = str(tiny), quantized("rtn"), quantized("rtn", 4)
    make_bit_map(*arguments, tmp_path / "whole.json", **calibration)
    monkeypatch.setattr(mixed_precision, "SAVE_SECONDS", 0)
    copies = []
    copy = BlockRunner.copy_block

    def interrupted(self, index):
        copies.append(index)
        if len(copies) == 5:  # in the second block, whose clean form and two variants are copied each
            raise KeyboardInterrupt
        return copy(self, index)

    monkeypatch.setattr(BlockRunner, "copy_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_bit_map(*arguments, tmp_path / "map.json", **calibration)
    assert copies == [0, 0, 0, 1, 1] and not (tmp_path / "map.json").exists()
    make_bit_map(*arguments, tmp_path / "map.json", **calibration)
    assert copies[5:] == [1, 1, 1]
    assert (tmp_path / "map.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_reused_blocks_are_those_made_afresh(tiny, quantized, calibration, tmp_path, monkeypatch):
    (tmp_path / "map.json").write_text('{"format": "decdec.bit_map", "version": 1, "bits": [3, 4]}')
    arguments = {"bit_map": str(tmp_path / "map.json")} | calibration
    quantize(str(tiny), "awq", 3.5, str(tmp_path / "afresh"), **arguments)
    taken = []
    block = Reusable.block
    monkeypatch.setattr(Reusable, "block", lambda self, name: taken.append(name) or block(self, name))
    quantize(str(tiny), "awq", 3.5, str(tmp_path / "merged"), reuse=[quantized("awq"), quantized("awq", 4)], **arguments)
    assert taken == ["model.layers.0", "model.layers.1"]
    for name in ("model.safetensors", "scaling.safetensors"):
        assert (tmp_path / "afresh" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert read_quant_config(tmp_path / "merged") == read_quant_config(tmp_path / "afresh")
    assert "3 and 4 bits" in describe(tmp_path / "merged") and "--bits 3.5" in (tmp_path / "merged" / "README.md").read_text()
    generated = run_script(ROOM.parent / "end-to-end" / "generate.py", "--model", tmp_path / "merged", "--prompt", "a", "--device", "cpu",
                           "--max-new-tokens", "4")
    assert generated.returncode == 0, generated.stderr
    with pytest.raises(UserError, match="reuse: .*calibration: expected"):
        quantize(str(tiny), "awq", 3.5, str(tmp_path / "no"), reuse=[quantized("awq")], **arguments | {"seed": 1})


def test_mistakes_in_maps_are_told(tiny, quantized, calibration, tmp_path):
    path = tmp_path / "map.json"

    def attempt(content, message, bits=3.5):
        path.write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            quantize(str(tiny), "rtn", bits, str(tmp_path / "out"), bit_map=str(path))
        assert "\n" not in str(caught.value) and not (tmp_path / "out" / "config.json").exists()

    attempt("{}", "expected format 'decdec.bit_map'")
    attempt('{"format": "decdec.bit_map", "version": 1, "bits": [2, 4]}', "expected blocks of the two bit widths next to 3.5")
    attempt('{"format": "decdec.bit_map", "version": 1, "bits": [3, 4, 4]}', "of a model of 3 blocks, this one has 2")
    attempt('{"format": "decdec.bit_map", "version": 1, "bits": [3, 4]}', "next to 3,", bits=3)
    with pytest.raises(UserError, match="got 3.5 without a bit-map"):
        quantize(str(tiny), "rtn", 3.5, str(tmp_path / "out"))
    with pytest.raises(UserError, match="the lower bits first, got awq at 4 bits and awq at 3 bits"):
        make_bit_map(str(tiny), quantized("awq", 4), quantized("awq"), path, **calibration)
