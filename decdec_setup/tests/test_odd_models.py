"""Models that are ill or oddly shaped: handled, or refused in one line that leaves no folder."""

import shutil

import pytest
import torch
import transformers

from decdec import hub
from decdec.errors import UserError
from decdec.linear import Compensation
from decdec.models import load_model

from cheatsheet import make_cheatsheet
from mixed_precision import make_bit_map
from quantize import METHODS, quantize
from thresholds import make_thresholds


@pytest.fixture
def odd(tiny, tmp_path):
    """``odd(change, **config)``: a one-block Llama of 32 channels with ``change(model)`` done to its weights."""
    def make(change=lambda model: None, **config):
        torch.manual_seed(0)
        shape = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape | config), dtype=torch.float16)
        with torch.no_grad():
            change(model)
        model.save_pretrained(tmp_path / "odd")
        for file in tiny.glob("tokenizer*"):
            shutil.copy(file, tmp_path / "odd")
        return tmp_path / "odd"

    return make


def silence(model):
    model.model.layers[0].mlp.up_proj.weight.zero_()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", ["nan in a weight", "inf in a weight", "nan in the activations"])
def test_what_is_not_finite_is_refused(odd, calibration, tmp_path, method, what):
    name = "model.embed_tokens.weight" if "activations" in what else "model.layers.0.mlp.up_proj.weight"

    def change(model):
        model.get_parameter(name)[:, 5] = float(what[:3])

    source = odd(change)
    if method == "rtn" and "activations" in what:
        pytest.skip("runs no model")
    with pytest.raises(UserError, match="not finite") as caught:
        quantize(str(source), method, 3, str(tmp_path / "out"), **calibration)
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [{"intermediate_size": 1}, {"intermediate_size": 42}], ids=["one channel", "d_out of 42"])
def test_a_layer_of_zeros_and_odd_widths_go_through_every_stage(odd, calibration, tmp_path, method, shape):
    source, out = odd(silence, **shape), tmp_path / "out"
    quantize(str(source), method, 3, str(out), **calibration)
    make_thresholds(out, **calibration)
    make_cheatsheet(out)
    model = hub.load(out, compensation=Compensation(k_chunk=1024, prefill=True))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert not model.model.layers[0].mlp.up_proj.dequantize(torch.float32).any()
        wanted, found = load_model(str(source), torch.float32)(tokens).logits, model(tokens).logits
    assert (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("method", ["awq", "gptq", "squeezellm"])
def test_hidden_states_beyond_float16_stay_finite(odd, calibration, tmp_path, method):
    """As in Gemma 3, whose residual stream grows past 65504 while its weights are published in 16 bits."""
    def grow(model):
        model.model.layers[0].mlp.down_proj.weight.normal_().mul_(9000)
        model.model.layers[0].mlp.gate_proj.weight.mul_(40)
        model.model.layers[0].mlp.up_proj.weight.mul_(40)

    source = odd(grow, num_hidden_layers=2)
    seen = []
    model = load_model(str(source), torch.float32)
    model.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max()))
    model(torch.arange(2, 40)[None])
    assert 65504 < seen[0] < 1e9
    quantize(str(source), method, 3, str(tmp_path / "out"), **calibration)
    make_thresholds(tmp_path / "out", **calibration)


def test_text_shorter_than_asked_is_refused(odd, calibration, tmp_path):
    source, out, text = odd(), tmp_path / "out", tmp_path / "short.txt"
    text.write_text("Too short to calibrate on.")
    short = calibration | {"text": str(text)}
    for bits in (3, 4):
        quantize(str(source), "rtn", bits, str(tmp_path / f"w{bits}"))
    work = [lambda method=method: quantize(str(source), method, 3, str(out), **short) for method in METHODS if method != "rtn"]
    work += [lambda: make_thresholds(tmp_path / "w3", **short),
             lambda: make_bit_map(str(source), tmp_path / "w3", tmp_path / "w4", tmp_path / "map.json", **short)]
    for attempt in work:
        with pytest.raises(UserError, match="short.txt has 26 tokens; 1 windows of 64 need 64") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not any(path.exists() for path in (out / "config.json", tmp_path / "w3" / "thresholds.pt", tmp_path / "map.json"))


def test_groups_that_do_not_divide_the_inputs_are_refused(odd, calibration, tmp_path):
    for method in ("awq", "gptq", "rtn"):
        with pytest.raises(UserError, match="group-size: expected a divisor of every layer's inputs, got 16 for 42 inputs"):
            quantize(str(odd(intermediate_size=42)), method, 3, str(tmp_path / "out"), group_size=16, **calibration)
