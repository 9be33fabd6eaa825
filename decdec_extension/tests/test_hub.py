"""Attaching a folder to a Hugging Face model: logits, settings, memory, and folders that do not fit."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import decdec
from decdec import hub, models, reference
from decdec.errors import UserError
from decdec.linear import Compensation
from decdec.testing import add_repair, quick_folder

SIZES = dict(vocab_size=160, hidden_size=96, intermediate_size=1088, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, initializer_range=0.1)
IDS = torch.arange(24)[None] * 5 % 160


def original(tied=True, qwen=False):
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES) if qwen else LlamaConfig(tie_word_embeddings=tied, **SIZES)
    model = Qwen2ForCausalLM(config) if qwen else LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return quick_folder(original(), tmp_path_factory.mktemp("hub") / "codebook")


def dense(model, folder):
    """The original with the dequantized weights in its own linear layers: what the attached model must equal."""
    tensors = load_file(folder / "model.safetensors")
    for name, linear in models.decoder_linears(model).items():
        packed = [tensors[f"{name}.{key}"] for key in ("qweight", "codebook", "scale") if f"{name}.{key}" in tensors]
        if len(packed) == 3:
            weight = reference.codebook_dequantize(*packed, linear.in_features, torch.float32)
        else:
            weight = reference.uniform_dequantize(*(tensors[f"{name}.{key}"] for key in ("qweight", "scales", "zeros")),
                                                  linear.in_features, torch.float32)
        linear.weight.data.copy_(weight)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("tied, qwen, form", [(True, False, "codebook"), (False, False, "uniform"),
                                              (False, True, "uniform")])
def test_loaded_and_attached_models_equal_the_dequantized_one(tmp_path, tied, qwen, form):
    path = quick_folder(original(tied, qwen), tmp_path / "m", form)
    want = logits(dense(original(tied, qwen), path))
    assert_close(logits(hub.load(path)), want, rtol=1e-4, atol=1e-4)
    assert_close(logits(hub.attach(original(tied, qwen), path)), want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(original(tied, qwen)), want, atol=1e-2)


def test_the_package_gives_what_a_user_needs():
    assert (decdec.attach, decdec.load, decdec.set_compensation) == (hub.attach, hub.load, hub.set_compensation)
    with pytest.raises(AttributeError, match="nothing"):
        decdec.nothing


def test_everything_else_in_the_folder_is_loaded_too(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 3  # AWQ folds its scales into norms
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    base = logits(hub.load(folder))
    assert_close(logits(hub.load(tmp_path / "m")), 3 * base, rtol=1e-4, atol=1e-4)
    assert_close(logits(hub.attach(original(), tmp_path / "m")), 3 * base, rtol=1e-4, atol=1e-4)


def test_compensation_comes_nearer_to_the_original_and_is_reset_without_reloading(folder):
    model, want = hub.load(folder), logits(original())
    base = logits(model)
    errors = [float((base - want).square().mean())]
    for k_chunk in (16, 128, 1024):
        hub.set_compensation(model, Compensation(k_chunk, "exact", prefill=True))
        errors.append(float((logits(model) - want).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05 * errors[0]
    hub.set_compensation(model, Compensation(128, "exact"))  # decode only: prefill gives the base again
    assert_close(logits(model), base)
    hub.set_compensation(model, {"qkv": Compensation(16, "bucket"), "d": Compensation(4, "static")})
    ks = {layer.kind: layer.compensation.k_chunk for layer in hub.compensated_layers(model).values()}
    assert ks == {"qkv": 16, "o": 0, "gu": 0, "d": 4}
    with pytest.raises(UserError, match="attention"):
        hub.set_compensation(model, {"attention": Compensation(1)})


def test_fp16_residuals_of_all_channels_restore_the_original(tmp_path):
    path = quick_folder(original(), tmp_path / "m", residual_bits=16)
    model = hub.load(path, compensation=Compensation(1024, prefill=True))
    assert_close(logits(model), logits(original()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("form", ["uniform", "codebook"])
@pytest.mark.parametrize("bits", [3, 4])
def test_nested_residuals_and_half_precision(tmp_path, form, bits):
    path = quick_folder(original(), tmp_path / "m", form, residual_bits=bits, nested=True)
    want, base = logits(original()), logits(hub.load(path))
    model = hub.load(path, dtype=torch.bfloat16, compensation=Compensation(1024, prefill=True))
    assert (logits(model).float() - want).square().mean() < 0.2 * (base - want).square().mean()


def test_generate_decodes_with_compensation(folder):
    model = hub.load(folder, compensation=Compensation(1024, "exact"))
    out = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False, pad_token_id=0,
                         eos_token_id=None)
    base, full = hub.load(folder), hub.load(folder, compensation=Compensation(1024, "exact", prefill=True))
    with torch.no_grad():  # the prompt by the base, each token after it by a model that compensates every position
        step = base(IDS, use_cache=True)
        tokens, uncompensated = [step.logits[:, -1:].argmax(2)], [step.logits[:, -1:].argmax(2)]
        cache, base_cache = copy.deepcopy(step.past_key_values), step.past_key_values
        for _ in range(5):
            tokens.append(full(tokens[-1], past_key_values=cache).logits.argmax(2))
            uncompensated.append(base(uncompensated[-1], past_key_values=base_cache).logits.argmax(2))
    assert torch.equal(out[:, 24:], torch.cat(tokens, dim=1))
    assert not torch.equal(out[:, 24:], torch.cat(uncompensated, dim=1))


def test_how_a_folder_generates_is_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5], "temperature": 0.6}))
    config = hub.load(tmp_path / "m").generation_config
    assert (config.eos_token_id, config.temperature) == ([1, 5], 0.6)
    (tmp_path / "m" / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config.json"):
        hub.load(tmp_path / "m")


def test_attaching_twice_is_refused(folder):
    model = hub.load(folder)
    with pytest.raises(UserError, match="already"):
        hub.attach(model, folder, Compensation(8))


@pytest.mark.parametrize("wrong", [None, 32, "32", {"gu": 16}])
def test_settings_of_other_types_are_refused_in_words(folder, wrong):
    with pytest.raises(UserError, match="expected a Compensation, a mapping of kinds to them, or 'plan', got"):
        hub.set_compensation(hub.load(folder), wrong)


def test_a_failed_change_leaves_no_mixture(folder, tmp_path):
    path = add_repair(shutil.copytree(folder, tmp_path / "m"))
    (path / "thresholds.pt").unlink()
    model, base = hub.load(path, compensation=Compensation(8, "exact", prefill=True)), logits(hub.load(path))
    settings = [layer.compensation for layer in hub.compensated_layers(model).values()]
    with pytest.raises(UserError, match="residuals: expected one of host, gpu, got 'vram'"):  # before anything is done
        hub.set_compensation(model, Compensation(8, "exact", repair=True), residuals="vram")
    assert settings == [layer.compensation for layer in hub.compensated_layers(model).values()]
    with pytest.raises(UserError, match="thresholds"):  # with other residuals at hand already
        hub.set_compensation(model, Compensation(8, repair=True))
    assert_close(logits(model), base, rtol=0, atol=0)


def test_memory_counts_packed_weights_and_rows_in_use(folder):
    model = hub.load(folder)
    tensors = load_file(folder / "model.safetensors")
    stored = sum(tensor.nbytes for tensor in tensors.values())
    known = hub.memory(model)
    assert known["host_bytes"] == 0 and stored <= known["device_bytes"] < stored * 1.01
    hub.set_compensation(model, Compensation(8))
    layers = hub.compensated_layers(model).values()
    assert hub.memory(model)["host_bytes"] == sum(layer.residual.nbytes for layer in layers) > 0
    assert "residual" not in " ".join(model.state_dict())


@pytest.mark.parametrize("spoil, match", [
    (lambda path: (path / "model.safetensors").write_bytes(b"12345678"), "cannot be read"),
    (lambda path: (path / "model.safetensors").unlink(), "no such file"),
    (lambda path: _edit(path, drop="model.layers.1.mlp.up_proj.qweight"), "up_proj"),
    (lambda path: _edit(path, drop="model.layers.1.mlp.up_proj.scale"), "up_proj.scale"),
    (lambda path: _edit(path, drop="model.norm.weight"), "model.norm.weight"),
    (lambda path: _edit(path, add="model.layers.2.norm.weight"), "fits nothing"),
    (lambda path: _config(path, bits=4), "qweight"),
    (lambda path: _config(path, bits=5), "bits"),
    (lambda path: _config(path, weights_hash="0"), "made for weights"),
    (lambda path: _config(path, bits="3"), "bits: expected one of .* got '3'"),
    (lambda path: _config(path, layer_bits=None), "layer_bits: expected a dict, got None"),
    (lambda path: _config(path, dense="lm_head"), "dense: expected a list"),
    (lambda path: _config(path, group_size="64"), "group_size: expected a positive integer or null, got '64'"),
    (lambda path: _config(path, group_size=0), "group_size"),
    (lambda path: _replace(path, quantization_config=None), "quantization_config: expected an object, got None"),
    (lambda path: (path / "config.json").write_text("[]"), "config.json: expected a model quantized by decdec_setup"),
    (lambda path: torch.save({"format": "decdec.cheatsheet", "version": 1}, path / "cheatsheet.pt"), "a config and tensors"),
    (lambda path: torch.save({"format": "decdec.thresholds", "version": 1, "config": {}, "tensors": []}, path / "thresholds.pt"),
     "a config and tensors"),
    (lambda path: (path / "cheatsheet.pt").write_bytes(b"PK"), "cannot be read"),
    (lambda path: (path / "cheatsheet.pt").unlink(), "cheatsheet.pt: no such file"),
    (lambda path: (path / "thresholds.pt").unlink(), "thresholds.pt: no such file"),
])
def test_folders_that_do_not_fit_are_refused_in_words(folder, tmp_path, spoil, match):
    path = tmp_path / "m"
    shutil.copytree(folder, path)
    spoil(path)
    with pytest.raises(UserError, match=match):
        hub.load(path, compensation=Compensation(8))


def _edit(path, drop=None, add=None):
    tensors = load_file(path / "model.safetensors")
    if drop:
        del tensors[drop]
    if add:
        tensors[add] = torch.ones(3)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _replace(path, **changes):
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | changes))


def _config(path, **changes):
    _replace(path, quantization_config=json.loads((path / "config.json").read_text())["quantization_config"] | changes)


def test_models_that_do_not_fit_are_refused_in_words(folder):
    torch.manual_seed(0)
    wider = LlamaForCausalLM(LlamaConfig(**(SIZES | {"intermediate_size": 1024})))
    with pytest.raises(UserError, match="another model"):
        hub.attach(wider, folder)
    deeper = LlamaForCausalLM(LlamaConfig(**(SIZES | {"num_hidden_layers": 3})))
    with pytest.raises(UserError, match="another model"):
        hub.attach(deeper, folder)
    for setting in (Compensation(8), {"gu": Compensation(8)}, "plan"):
        with pytest.raises(UserError, match="attach"):
            hub.set_compensation(original(), setting)
