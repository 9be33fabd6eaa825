"""Checkpoints of other programs, written here from their published layouts: read to the last code, and compensated."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import decdec.quantizer  # noqa: F401  (registers the method)
from decdec import hub, models
from decdec.artifacts import read_quant_config
from decdec.errors import UserError
from decdec.linear import Compensation, CompensatedLinear
from decdec.testing import run_script

import import_checkpoint as script
from cheatsheet import make_cheatsheet
from describe import describe
from import_checkpoint import import_checkpoint
from runtime import Runtime
from thresholds import make_thresholds

IDS = torch.arange(2, 26)[None]
SIZE = 64  # of a group
EVERYTHING = Compensation(1024, "exact", prefill=True)


def words_of(codes):
    """Rows of unsigned codes as int32 words, each bit where the published layouts have it: lowest first, no gaps."""
    codes, bits = codes
    stream = (codes.numpy()[:, :, None] >> np.arange(bits)) & 1
    stream = stream.reshape(len(codes), -1)
    padded = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32))).astype(np.uint8)
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32).copy())


def rounded(weight, bits, symmetric=False, order=None):
    """Codes ``(d_out, d_in)``, scales and zeros ``(d_out, groups)`` of groups in ``order``, and the weight."""
    order = torch.arange(weight.shape[1]) if order is None else order
    grouped = weight[:, order].reshape(len(weight), -1, SIZE)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / (2**bits - 1)).clamp(min=1e-4).half().float()
    zeros = torch.full_like(scales, 2**(bits - 1)) if symmetric else (-low / scales).round().clamp(0, 2**bits - 1)
    codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    dense = torch.empty_like(weight)
    dense[:, order] = ((codes - zeros[..., None]) * scales[..., None]).flatten(1)
    natural = torch.empty_like(weight)
    natural[:, order] = codes.flatten(1)
    return natural.to(torch.int64), scales, zeros, dense


def gptq(name, weight, bits, act_order=False, first_version=True):
    order = torch.randperm(weight.shape[1]) if act_order else torch.arange(weight.shape[1])
    codes, scales, zeros, dense = rounded(weight, bits, order=order)
    group_of = torch.empty(weight.shape[1], dtype=torch.int32)
    group_of[order] = torch.arange(weight.shape[1], dtype=torch.int32) // SIZE
    zeros = zeros.t().to(torch.int64)
    if not first_version:
        qzeros = words_of((zeros, bits))
    elif bits == 3:
        qzeros = words_of(((zeros - 1) % 8, 3))
    else:  # one less in every field, by one subtraction a word
        qzeros = words_of((zeros, bits)) - words_of((torch.ones_like(zeros), bits))
    return {f"{name}.qweight": words_of((codes, bits)).t(), f"{name}.qzeros": qzeros,
            f"{name}.scales": scales.t().half(), f"{name}.g_idx": group_of}, dense


def awq(name, weight, bits, gemv=False):
    codes, scales, zeros, dense = rounded(weight, bits)
    zeros = zeros.to(torch.int64)
    if gemv:
        padded = torch.nn.functional.pad(scales, (0, -scales.shape[1] % 8))
        return {f"{name}.qweight": words_of((codes, 4)), f"{name}.qzeros": words_of((zeros, 4)),
                f"{name}.scales": padded.half()}, dense
    nibbles = [0, 2, 4, 6, 1, 3, 5, 7]  # the output that lies in each nibble of a word
    take = torch.arange(len(weight)).view(-1, 8)[:, nibbles].flatten()
    return {f"{name}.qweight": words_of((codes[take].t(), 4)), f"{name}.qzeros": words_of((zeros[take].t(), 4)),
            f"{name}.scales": scales.t().half()}, dense


def hqq(name, weight, bits):
    codes, scales, _, _ = rounded(weight, bits)
    zeros = (torch.rand_like(scales) * 2**bits).half().float()  # any number, not only integers
    dense = (codes - zeros.repeat_interleave(SIZE, 1)) * scales.repeat_interleave(SIZE, 1)
    rows = codes.reshape(-1, SIZE)
    parts = {4: 2, 3: 10, 2: 4}[bits]
    rows = torch.cat([rows, rows.new_zeros(-len(rows) % parts, SIZE)]).view(parts, -1, SIZE)
    words = sum(part << bits * (parts - 1 - number) for number, part in enumerate(rows))
    stored = {"W_q": words.to(torch.int32 if bits == 3 else torch.uint8), "scale": scales.half().view(-1, 1),
              "zero": zeros.half().view(-1, 1), "nbits": torch.tensor(bits), "axis": torch.tensor(1),
              "shape": torch.tensor(weight.shape), "group_size": torch.tensor(SIZE), "quant_scale": torch.tensor(0),
              "packing": torch.tensor([*b"4bit_u8"], dtype=torch.uint8), "view_as_float": torch.tensor(0)}
    return {f"{name}.{key}": tensor for key, tensor in stored.items()}, dense


def compressed(name, weight, bits, symmetric=True, packed=True):
    codes, scales, zeros, dense = rounded(weight, bits, symmetric)
    stored = {f"{name}.weight_scale": scales.half(), f"{name}.weight_shape": torch.tensor(weight.shape)}
    if packed:
        stored[f"{name}.weight_packed"] = words_of((codes, bits))
    else:
        stored[f"{name}.weight"] = (codes - 2**(bits - 1)).to(torch.int8)
    if not symmetric:
        point = zeros.to(torch.int64)
        stored[f"{name}.weight_zero_point"] = (words_of((point.t(), bits)).t() if packed else
                                               (point - 2**(bits - 1)).to(torch.int8))
    return stored, dense


def scheme(bits, **more):
    return {"targets": ["Linear"], "weights": {"num_bits": bits, "type": "int", "strategy": "group", "group_size": SIZE,
                                               **more}}


def settings(method, bits):
    """The quantization config that such a folder has."""
    plain = {"quant_method": method, "bits": bits, "group_size": SIZE}
    return {"hqq": {"quant_method": method, "quant_config": {"weight_quant_params": {"nbits": bits}}},
            "compressed-tensors": {"quant_method": method, "format": "pack-quantized",
                                   "config_groups": {"group_0": scheme(bits)}}}.get(method, plain)


def write(source, out, pack, config, model=None):
    """The folder that another program would write of ``source``; returns the dense model that it stands for."""
    model = model or models.load_model(str(source), torch.float32)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for name, linear in models.decoder_linears(model).items():
        stored, dense = pack(name, tensors.pop(f"{name}.weight"))
        tensors |= {key: tensor.contiguous() for key, tensor in stored.items()}
        linear.weight.data.copy_(dense)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("model.safetensors"))
    halved = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in tensors.items()}
    save_file(halved, out / "model.safetensors")
    content = json.loads((out / "config.json").read_text()) | {"quantization_config": config}
    (out / "config.json").write_text(json.dumps(content))
    return model


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


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


def test_the_library_of_compressed_tensors_is_read_as_it_reads_itself(tiny, tmp_path):
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    for bits, symmetric in ((4, True), (4, False), (3, False), (2, True)):
        plan = QuantizationScheme(**scheme(bits, symmetric=symmetric))

        def pack(name, weight):
            _, scales, zeros, _ = rounded(weight, bits, symmetric)
            given = {"weight": weight, "weight_scale": scales,
                     "weight_zero_point": (zeros - 2**(bits - 1)).to(torch.int8)}
            stored = PackedQuantizationCompressor.compress(given, plan)
            return ({f"{name}.{key}": tensor for key, tensor in stored.items()},
                    PackedQuantizationCompressor.decompress(stored, plan)["weight"])

        foreign, out = tmp_path / f"foreign{bits}{symmetric}", tmp_path / f"out{bits}{symmetric}"
        want = write(tiny, foreign, pack, settings("compressed-tensors", bits) | {"version": library.__version__})
        import_checkpoint(str(foreign), out)
        model = hub.load(out)
        for name, linear in models.decoder_linears(want).items():
            assert_close(model.get_submodule(name).dequantize(torch.float32), linear.weight, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_in_the_hands_of_its_library_is_compensated_beside_it(tiny, tmp_path):
    pytest.importorskip("compressed_tensors")
    config = settings("compressed-tensors", 4) | {"quantization_status": "compressed", "ignore": ["lm_head"]}
    want = write(tiny, tmp_path / "foreign", lambda name, weight: compressed(name, weight, 4), config)
    out = tmp_path / "out"
    import_checkpoint(str(tmp_path / "foreign"), out, str(tiny))
    make_cheatsheet(out)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "foreign", dtype=torch.float32)
    assert "model.layers.0.mlp.up_proj.weight_packed" in theirs.state_dict()
    hub.attach(theirs, out)
    ours = hub.load(out)
    for setting in (Compensation(), EVERYTHING):
        for model in (theirs, ours):
            hub.set_compensation(model, setting)
        assert_close(logits(theirs), logits(ours), rtol=1e-3, atol=1e-3)
        assert ((logits(theirs) - logits(want)).abs().max() > 0.01) == (setting.k_chunk > 0)
    assert not any(isinstance(module, CompensatedLinear) for module in theirs.modules())


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_library_of_hqq_is_read_as_it_reads_itself_and_compensated_beside_it(tiny, tmp_path, bits):
    library = pytest.importorskip("hqq.core.quantize")
    layers = {}

    def pack(name, weight):
        linear = torch.nn.Linear(weight.shape[1], len(weight), bias=False)
        linear.weight.data.copy_(weight)
        config = library.BaseQuantizeConfig(nbits=bits, group_size=SIZE, axis=1)
        layer = layers[name] = library.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
        stored = {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items() if isinstance(tensor, torch.Tensor)}
        return stored, layer.dequantize()

    theirs = write(tiny, tmp_path / "foreign", pack, settings("hqq", bits))
    out = tmp_path / "out"
    import_checkpoint(str(tmp_path / "foreign"), out, str(tiny))
    make_cheatsheet(out)
    want = logits(theirs)
    for name, layer in layers.items():
        hub.replace(theirs, name, layer)
    assert_close(logits(theirs), want, rtol=1e-3, atol=1e-3)
    ours = hub.load(out)
    assert_close(logits(ours), want, rtol=1e-2, atol=1e-2)
    hub.attach(theirs, out)
    for model in (theirs, ours):
        hub.set_compensation(model, EVERYTHING)
    assert_close(logits(theirs), logits(ours), rtol=1e-2, atol=1e-2)
    assert (logits(theirs) - want).abs().max() > 0.01


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
