"""Checkpoints of other programs, written from their published layouts: read to the last code, and compensated."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import decdec.quantizer  # noqa: F401  (registers the method)
from decdec import hub, models
from decdec.artifacts import read_quant_config
from decdec.errors import UserError
from decdec.linear import Compensation
from decdec.testing import run_script

import import_checkpoint as script
from cheatsheet import make_cheatsheet
from describe import describe
from foreign_layouts import EVERYTHING, IDS, awq, compressed, gptq, hqq, logits, scheme, settings, write
from import_checkpoint import import_checkpoint
from runtime import Runtime
from thresholds import make_thresholds

CASES = [("gptq", 4, gptq, {}), ("gptq", 3, gptq, {}), ("gptq", 2, gptq, {}),
         ("gptq", 3, gptq, {"first_version": False}), ("gptq", 4, gptq, {"act_order": True}),
         ("awq", 4, awq, {}), ("awq", 4, awq, {"gemv": True}),
         ("hqq", 4, hqq, {}), ("hqq", 3, hqq, {}), ("hqq", 2, hqq, {}),
         ("compressed-tensors", 4, compressed, {}), ("compressed-tensors", 3, compressed, {"symmetric": False}),
         ("compressed-tensors", 4, compressed, {"symmetric": False, "packed": False})]


@pytest.mark.parametrize("method, bits, pack, variant", CASES,
                         ids=["-".join([case[0], str(case[1]), *case[3]]) for case in CASES])
def test_every_format_gives_the_weights_it_stands_for(tiny, tmp_path, method, bits, pack, variant):
    config = settings(method, bits)
    if variant.get("first_version") is False:
        config["checkpoint_format"] = "gptq_v2"
    if variant.get("gemv"):
        config["version"] = "gemv"
    if variant.get("packed") is False:
        config["format"] = "int-quantized"
    torch.manual_seed(0)
    want = write(tiny, tmp_path / "foreign", lambda name, weight: pack(name, weight, bits, **variant), config)
    assert import_checkpoint(str(tmp_path / "foreign"), tmp_path / "out", str(tiny) if method == "gptq" else None)
    model = hub.load(tmp_path / "out")
    for name, linear in models.decoder_linears(want).items():
        assert_close(model.get_submodule(name).dequantize(torch.float32), linear.weight, rtol=1e-6, atol=1e-6)
    assert_close(logits(model), logits(want), rtol=1e-3, atol=1e-3)
    if variant.get("act_order"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert not (tmp_path / "out" / "scaling.safetensors").exists()


@pytest.mark.parametrize("act_order", [False, True])
def test_residuals_and_thresholds_follow_as_for_any_folder(tiny, calibration, tmp_path, act_order):
    torch.manual_seed(0)
    write(tiny, tmp_path / "foreign", lambda name, weight: gptq(name, weight, 3, act_order), settings("gptq", 3))
    out = tmp_path / "out"
    import_checkpoint(str(tmp_path / "foreign"), out, str(tiny))
    make_cheatsheet(out, bits=16)
    make_thresholds(out, **calibration)
    original, model = models.load_model(str(tiny), torch.float32), hub.load(out)
    want, base = logits(original), logits(model)
    errors = [float((base - want).norm())]
    for setting in (Compensation(64, "bucket", prefill=True), Compensation(64, "static", prefill=True), EVERYTHING):
        hub.set_compensation(model, setting)
        errors.append(float((logits(model) - want).norm()))
    assert errors[1] < 0.9 * errors[0] and errors[2] < errors[0] and errors[3] < 0.02 * errors[0]
    if act_order:
        with pytest.raises(UserError, match="activation order"):
            make_cheatsheet(out, nested=True, bits=2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])
def test_the_runtime_takes_inputs_in_activation_order(tiny, tmp_path, device):
    def pack(name, weight):
        torch.manual_seed(weight.shape[1])  # layers of one input have one order, as GPTQ's have
        return gptq(name, weight, 3, act_order=True)

    write(tiny, tmp_path / "foreign", pack, settings("gptq", 3))
    out = tmp_path / "out"
    import_checkpoint(str(tmp_path / "foreign"), out, str(tiny))
    make_cheatsheet(out)
    runtime = Runtime(out, device=device)
    model, ids = hub.load(out, runtime.dtype, device=device), IDS.to(device)
    same = 12 if device == "cpu" else 4  # tokens; in half precision later ones may part on a tie
    for setting in (Compensation(), Compensation(64, "exact")):
        hub.set_compensation(model, setting)
        runtime.compensate(setting)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=same, do_sample=False,
                               pad_token_id=0, eos_token_id=None)
        assert list(runtime.stream(IDS[0].tolist(), same, stop=())) == found[0, IDS.shape[1]:].tolist()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj"])
def test_a_checkpoint_without_all_of_its_tensors_is_refused(tiny, tmp_path, name):
    write(tiny, tmp_path / "foreign", lambda name, weight: gptq(name, weight, 3), settings("gptq", 3))
    stored = tmp_path / "foreign/model.safetensors"
    save_file({key: tensor for key, tensor in load_file(stored).items() if not key.startswith(name)}, stored)
    with pytest.raises(UserError, match=f"has no tensor {name}.*: an incomplete folder"):
        import_checkpoint(str(tmp_path / "foreign"), tmp_path / "out", str(tiny))


def folded(model):
    """``model`` with random scales folded into norms, and from ``up`` into ``down``: the same function."""
    torch.manual_seed(1)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for before, behind in ((block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                               (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
                               (mlp.up_proj, (mlp.down_proj,))):
            scale = torch.exp(torch.randn(behind[0].in_features) * 0.7)
            before.weight.data.div_(scale if before.weight.dim() == 1 else scale[:, None])
            for layer in behind:
                layer.weight.data.mul_(scale)
    return model


def test_scales_that_were_folded_into_the_original_are_found(tiny, calibration, tmp_path):
    original = models.load_model(str(tiny), torch.float32)
    want = logits(original)
    scaled = folded(models.load_model(str(tiny), torch.float32))
    assert_close(logits(scaled), want, rtol=1e-3, atol=1e-3)
    write(tiny, tmp_path / "foreign", lambda name, weight: awq(name, weight, 4), settings("awq", 4), scaled)
    out = tmp_path / "out"
    import_checkpoint(str(tmp_path / "foreign"), out, str(tiny))
    layers = "model.layers.0."
    found = load_file(out / "scaling.safetensors")
    assert {f"{layers}self_attn.v_proj.input_scale", f"{layers}mlp.up_proj.output_scale",
            f"{layers}mlp.down_proj.input_scale", f"{layers}input_layernorm.output_scale"} <= set(found)
    assert f"{layers}self_attn.o_proj.input_scale" not in found
    make_cheatsheet(out, bits=16)
    make_thresholds(out, **calibration)
    model = hub.load(out)
    error = float((logits(model) - want).norm())
    hub.set_compensation(model, EVERYTHING)
    assert float((logits(model) - want).norm()) < 0.03 * error
    hub.set_compensation(model, Compensation(64, "bucket", prefill=True))
    assert float((logits(model) - want).norm()) < 0.9 * error


def test_layers_of_eight_bits_are_kept_dequantized(tiny, tmp_path):
    def pack(name, weight):
        return compressed(name, weight, 8 if "down" in name else 4)

    config = settings("compressed-tensors", 4)
    config["config_groups"]["group_1"] = scheme(8)
    want = write(tiny, tmp_path / "foreign", pack, config)
    out = tmp_path / "out"
    import_checkpoint(str(tmp_path / "foreign"), out, str(tiny))
    make_cheatsheet(out)
    assert set(read_quant_config(out).dense) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    for model in (hub.load(out), AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)):
        assert_close(logits(model), logits(want), rtol=1e-2, atol=1e-2)
        hub.set_compensation(model, Compensation(8, "exact"))
        assert len(hub.compensated_layers(model)) == 12


def edit(folder, add=None, drop=None, **changes):
    tensors = load_file(folder / "model.safetensors")
    if drop:
        del tensors[drop]
    save_file(tensors | (add or {}), folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(content))


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("spoil, match", [
    (lambda f: edit(f, quant_method="bitsandbytes"), "quant_method: expected one of gptq, awq, hqq"),
    (lambda f: edit(f, checkpoint_format="marlin"), "checkpoint_format: expected 'gptq' or 'gptq_v2'"),
    (lambda f: edit(f, drop=f"{UP}.scales"), "has no tensor .*up_proj.scales"),
    (lambda f: edit(f, add={f"{UP}.scales": torch.ones(3, 5).half()}), "up_proj"),
    (lambda f: edit(f, add={f"{UP}.scales": torch.full((3, 1088), torch.nan).half()}), "finite scales"),
    (lambda f: edit(f, add={f"{UP}.g_idx": torch.zeros(192, dtype=torch.int32)}), "up_proj"),
    (lambda f: edit(f, add={f"{UP}.bias": torch.ones(1088)}), "up_proj.bias fits nothing"),
    (lambda f: edit(f, add={"model.layers.1.mlp.act.scales": torch.ones(3)}), "fits nothing"),
    (lambda f: edit(f, add={"model.layers.7.mlp.up_proj.qweight": torch.ones(3)}), "no linear layer"),
    (lambda f: (f / "model.safetensors").write_bytes(b"12345678"), "cannot be read"),
    (lambda f: (f / "model.safetensors").unlink(), "expected safetensors files"),
    (lambda f: (f / "config.json").unlink(), "config.json"),
])
def test_folders_that_cannot_be_read_are_refused_in_one_line(tiny, tmp_path, spoil, match):
    foreign = tmp_path / "foreign"
    write(tiny, foreign, lambda name, weight: gptq(name, weight, 4), settings("gptq", 4))
    spoil(foreign)
    with pytest.raises(UserError, match=match) as error:
        import_checkpoint(str(foreign), tmp_path / "out", str(tiny))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_what_old_releases_stored_for_nothing_is_passed_over(tiny, tmp_path):
    foreign = tmp_path / "foreign"
    write(tiny, foreign, lambda name, weight: gptq(name, weight, 4), settings("gptq", 4))
    config = json.loads((foreign / "config.json").read_text())
    own = config.pop("quantization_config")
    del own["quant_method"]  # AutoGPTQ's own file, and names
    (foreign / "config.json").write_text(json.dumps(config))
    (foreign / "quantize_config.json").write_text(json.dumps(own))
    tensors = load_file(foreign / "model.safetensors")
    (foreign / "model.safetensors").unlink()
    idle = {f"{UP}.bias": torch.zeros(1088), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    save_file(tensors | idle, foreign / "gptq_model-4bit-64g.safetensors")
    import_checkpoint(str(foreign), tmp_path / "out", str(tiny))
    assert logits(hub.load(tmp_path / "out")).isfinite().all()


def test_originals_that_do_not_fit_are_refused(tiny, tmp_path):
    write(tiny, tmp_path / "foreign", lambda name, weight: gptq(name, weight, 4), settings("gptq", 4))
    other = models.load_model(str(tiny))
    other.model.layers[1].mlp.up_proj.weight.data.normal_()
    shutil.copytree(tiny, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="up_proj of .* is not a rounding of that of"):
        import_checkpoint(str(tmp_path / "foreign"), tmp_path / "out", str(tmp_path / "other"))
    with pytest.raises(UserError, match="expected a quantization_config, got none"):
        import_checkpoint(str(tiny), tmp_path / "out")
    with pytest.raises(UserError, match="only wider ones"):
        write(tiny, tmp_path / "eight", lambda name, weight: gptq(name, weight, 8), settings("gptq", 8))
        import_checkpoint(str(tmp_path / "eight"), tmp_path / "out")


def test_the_script(tiny, tmp_path):
    write(tiny, tmp_path / "foreign", lambda name, weight: gptq(name, weight, 4), settings("gptq", 4))
    out = tmp_path / "out"
    result = run_script(script.__file__, tmp_path / "foreign", out, "--model", tiny)
    assert json.loads(result.stdout)["wrote"] == str(out), result.stderr
    assert not import_checkpoint(str(tmp_path / "foreign"), out, str(tiny))  # it is there already
    assert "gptq (uniform), 4 bits, groups of 64" in describe(out)
    assert "import_checkpoint.py foreign FOLDER" in (out / "README.md").read_text()
    with pytest.raises(UserError, match="model folder or a hub id"):
        import_checkpoint(str(tmp_path / "nothing"), out)
