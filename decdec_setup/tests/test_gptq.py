import pytest
import torch
from safetensors.torch import load_file

from decdec import reference
from decdec.artifacts import read_quant_config
from decdec.errors import UserError
from decdec.models import decoder_linears, load_model, load_tokenizer
from decdec.text import calibration_samples, load_text

import gptq
from quantize import quantize
from quantized_blocks import QuantizedBlocks
from uniform import fake_quantize, grid


def one_by_one(weight, gram, tokens, bits, group_size, order):
    """GPTQ as its paper derives it: float64, the inverse of what is left of H kept by elimination, one column after another."""
    weight, inverse = weight.double().clone(), gram.double()
    inverse = torch.linalg.inv(inverse + (0.01 + len(gram) / tokens) * inverse.diagonal().diag())
    result = torch.zeros_like(weight)
    natural = bool((order == torch.arange(len(order))).all())
    fixed = [grid(part.amin(1).float(), part.amax(1).float(), bits) for part in weight.split(group_size, dim=1)]
    for place, column in enumerate(order.tolist()):
        group = column // group_size
        if natural and column % group_size == 0:
            part = weight[:, column:column + group_size].float()
            fixed[group] = grid(part.amin(1), part.amax(1), bits)
        scale, zero = (part.double() for part in fixed[group])
        code = (torch.round(weight[:, column] / scale) + zero).clamp(0, 2**bits - 1)
        result[:, column] = (code - zero) * scale
        error = (weight[:, column] - result[:, column]) / inverse[column, column]
        later = order[place + 1:]
        weight[:, later] -= error[:, None] * inverse[column, later]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return result


def output_error(dense, weight, gram):
    difference = (dense - weight).double()
    return float(((difference @ gram.double()) * difference).sum())


def correlated(d_in, tokens=600):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, d_in, generator=generator) @ torch.randn(d_in, d_in, generator=generator) / d_in**0.5
    x[:, ::17] *= 5
    return 0.1 * torch.randn(48, d_in, generator=generator), x.t() @ x


def dense(codes, scale, zero, group_size):
    return ((codes.float().unflatten(1, (-1, group_size)) - zero[..., None]) * scale[..., None]).flatten(1)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [32, 96])
def test_gptq_errs_as_the_straightforward_algorithm(group_size, act_order):
    weight, gram = correlated(192)
    order = torch.argsort(gram.diagonal(), descending=True) if act_order else torch.arange(192)
    wanted = one_by_one(weight, gram, 600, 3, group_size, order).float()
    found = dense(*gptq.quantize_rows(weight.clone(), gram, 600, 3, group_size, act_order), group_size)
    # One rounding that falls the other way in float32 changes the rest of its row, so most weights agree, not all.
    assert ((found - wanted).abs() < 1e-4).float().mean() > 0.9
    rounded = fake_quantize(weight.unflatten(1, (-1, group_size)), 3).flatten(1)
    errors = [output_error(each, weight, gram) for each in (found, wanted, rounded)]
    assert abs(errors[0] - errors[1]) < 0.02 * errors[1] and errors[0] < 0.7 * errors[2]


def test_uncorrelated_inputs_are_rounded_to_nearest():
    weight, _ = correlated(128)
    found = dense(*gptq.quantize_rows(weight.clone(), torch.eye(128), 128, 4, 32), 32)
    torch.testing.assert_close(found, fake_quantize(weight.unflatten(1, (-1, 32)), 4).flatten(1))


def test_the_factor_is_that_of_the_damped_inverse():
    _, gram = correlated(64)
    upper = gptq.inverse_factor(gram, 600).double()
    damped = gram.double() + (gptq.DAMPING + 64 / 600) * gram.double().diagonal().diag()
    torch.testing.assert_close(upper.t() @ upper @ damped, torch.eye(64, dtype=torch.float64), rtol=1e-3, atol=1e-3)
    assert torch.equal(upper, upper.triu())
    # Channels that are never active, or copies of each other, leave it finite.
    gram[3] = gram[:, 3] = 0
    assert gptq.inverse_factor(gram, 600).isfinite().all() and gptq.inverse_factor(torch.zeros(8, 8), 9).isfinite().all()
    assert gptq.inverse_factor(torch.ones(64, 64), 10**6).isfinite().all()
    with pytest.raises(UserError, match="not finite"):
        gptq.inverse_factor(gram * torch.nan, 600)


def test_later_blocks_are_calibrated_on_the_quantized_ones(tiny, quantized, calibration, tmp_path):
    """The first block does not depend on others' bits, the second does; a resumed run sees the same inputs."""
    bits = tmp_path / "map.json"
    bits.write_text('{"format": "decdec.bit_map", "version": 1, "bits": [4, 3]}')
    quantize(str(tiny), "gptq", 3.5, str(tmp_path / "mixed"), bit_map=str(bits), **calibration)
    mixed, plain = (load_file(folder / "model.safetensors") for folder in (tmp_path / "mixed", quantized("gptq")))
    assert not torch.equal(mixed["model.layers.1.mlp.up_proj.qweight"], plain["model.layers.1.mlp.up_proj.qweight"])
    quant = read_quant_config(tmp_path / "mixed")
    assert quant.bits == 3 and set(quant.layer_bits.values()) == {4} and len(quant.layer_bits) == 7
    for name, module in decoder_linears(load_model(str(tiny))).items():
        found = reference.uniform_dequantize(*(mixed[f"{name}.{part}"] for part in ("qweight", "scales", "zeros")),
                                             module.in_features, torch.float32)
        assert (found - module.weight.float()).norm() < 0.5 * module.weight.float().norm()
    with pytest.raises(UserError, match="reuse: expected another method"):
        quantize(str(tiny), "gptq", 3.5, str(tmp_path / "other"), bit_map=str(bits), reuse=[quantized("gptq")], **calibration)


def test_layers_of_a_folder_err_as_the_straightforward_algorithm(tiny, quantized, calibration):
    tokens = calibration_samples(load_text("pydoc", "calibration"), load_tokenizer(str(tiny)), 3, 64, 0)
    model, blocks = load_model(str(tiny), torch.float32), QuantizedBlocks(quantized("gptq"))
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.gate_proj"):
        module, inputs = model.get_submodule(name), []
        hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            model(tokens)
        hook.remove()
        x, weight = torch.cat(inputs), module.weight.detach()
        order = torch.argsort(x.square().sum(0), descending=True)
        plain = one_by_one(weight, x.t() @ x, len(x), 3, 64, order).float()
        found = output_error(blocks.weight(name, weight.shape), weight, x.t() @ x)
        assert found == pytest.approx(output_error(plain, weight, x.t() @ x), rel=0.05), name
