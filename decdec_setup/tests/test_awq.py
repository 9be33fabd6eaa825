import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from decdec import reference
from decdec.artifacts import read_quant_config
from decdec.models import decoder_linears, load_model, load_tokenizer
from decdec.text import calibration_samples, load_text

import awq
from blocks import BlockRunner
from groups import Group, find_groups
from scaling import read_scaling, scale_model
from uniform import fake_quantize


def test_folding_leaves_the_function_unchanged(tiny, quantized):
    tokens = calibration_samples(load_text("pydoc", "calibration"), load_tokenizer(str(tiny)), 2, 48, 5)
    model = load_model(str(tiny), torch.float32)
    before = model(tokens).logits
    weights = {name: module.weight.clone() for name, module in decoder_linears(model).items()}
    scaling = read_scaling(quantized("awq"))
    after = scale_model(model, scaling).double()(tokens).logits.float()
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    changed = {name for name, module in decoder_linears(model).items() if not torch.equal(module.weight.float(), weights[name])}
    # Grouped-query attention: o's inputs are not v's outputs one by one, so only o stays as it was.
    assert changed == {name for name in weights if not name.endswith("o_proj")}


def test_packed_weights_and_norms_are_those_of_the_scaled_original(tiny, quantized):
    folder = quantized("awq", 4)
    tensors = load_file(folder / "model.safetensors")
    model = scale_model(load_model(str(tiny), torch.float32), read_scaling(folder))
    for name, module in decoder_linears(model).items():
        dense = reference.uniform_dequantize(*(tensors[f"{name}.{part}"] for part in ("qweight", "scales", "zeros")),
                                             module.in_features, torch.float32)
        assert (dense - module.weight).norm() < 0.15 * module.weight.norm(), name
    for name, value in model.state_dict().items():
        if "norm" in name:
            torch.testing.assert_close(tensors[name].float(), value, rtol=2e-3, atol=1e-4)


def random_group(d_in=128, d_out=96):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, d_in, generator=generator)
    x[:, ::40] *= 20  # a few channels that matter more
    module = nn.Linear(d_in, d_out, bias=False)
    group = Group({"up_proj": module})
    group.see(x)
    return group, module.weight.detach(), x


def output_error(weight, dense, x):
    return float(((dense - weight) @ x.t()).square().sum())


@torch.no_grad()
def test_searched_scale_and_clip_lessen_the_output_error():
    group, weight, x = random_group()
    plain = fake_quantize(weight.unflatten(1, (-1, 64)), 3).flatten(1)
    scale = awq.search_scale(group, 3, 64)
    scaled = fake_quantize((weight * scale).unflatten(1, (-1, 64)), 3).flatten(1) / scale
    assert output_error(weight, scaled, x) < 0.5 * output_error(weight, plain, x)
    # The search's own measure is the output error: no other ratio does better on the tokens themselves.
    magnitude = x.abs().mean(0)
    for step in range(awq.SCALE_STEPS):
        other = magnitude ** (step / awq.SCALE_STEPS)
        other = other / (other.max() * other.min()).sqrt()
        dense = fake_quantize((weight * other).unflatten(1, (-1, 64)), 3).flatten(1) / other
        assert output_error(weight, scaled, x) <= output_error(weight, dense, x) * 1.001

    limit = awq.search_clip(weight, group.gram, 3, 64)
    grouped, parts = weight.unflatten(1, (-1, 64)), x.unflatten(1, (-1, 64))

    def partial(candidate):
        error = fake_quantize(grouped, 3, candidate) - grouped
        return torch.einsum("ogi,tgi->ogt", error, parts).square().sum(-1)

    largest = grouped.abs().amax(-1)
    chosen = partial(limit)
    for step in range(awq.CLIP_STEPS):
        assert (chosen <= partial(largest * (1 - step / (2 * awq.CLIP_STEPS))) * 1.01 + 1e-6).all()
    assert (limit < largest).float().mean() > 0.2


def test_what_takes_the_scales_is_found_by_trying(tiny):
    """The norms, and ``up`` for ``down``; with grouped-query attention nothing for ``o``. The search leaves no trace."""
    tokens = calibration_samples(load_text("pydoc", "calibration"), load_tokenizer(str(tiny)), 1, 32, 0)
    runner = BlockRunner(load_model(str(tiny)), tokens)
    with torch.no_grad():
        hidden, block = runner.embed()[0], runner.copy_block(0)
        before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        groups = find_groups(runner, 0, block, hidden)
        found = [awq.find_producer(runner, 0, block, group, groups, hidden) for group in groups]
    names = [producer and producer.name.removeprefix("model.layers.0.") for producer in found]
    assert names == ["input_layernorm", None, "post_attention_layernorm", "mlp.up_proj"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def test_awq_is_nearer_to_the_original_than_rtn(tiny, quantized):
    tokens = calibration_samples(load_text("pydoc", "calibration"), load_tokenizer(str(tiny)), 4, 48, 9)
    wanted = load_model(str(tiny), torch.float32)(tokens).logits.log_softmax(-1)

    def distance(method):
        folder = quantized(method)
        tensors = load_file(folder / "model.safetensors")
        model = scale_model(load_model(str(tiny), torch.float32), read_scaling(folder))
        for name, module in decoder_linears(model).items():
            module.weight.data = reference.uniform_dequantize(
                *(tensors[f"{name}.{part}"] for part in ("qweight", "scales", "zeros")), module.in_features, torch.float32)
        return float(F.kl_div(model(tokens).logits.log_softmax(-1), wanted, log_target=True, reduction="sum"))

    assert read_quant_config(quantized("awq")).group_size == read_quant_config(quantized("rtn")).group_size == 64
    assert distance("awq") < distance("rtn")
