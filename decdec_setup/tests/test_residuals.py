import pytest
import torch
from safetensors.torch import load_file

from decdec import ops, reference
from decdec.artifacts import load_cheatsheet, read_quant_config
from decdec.errors import UserError
from decdec.models import decoder_linears, load_model
from decdec.original import load_original_cheatsheet, load_original_thresholds, save_original_thresholds
from decdec.packing import unpack_residual
from decdec.residual import fit_interval, pack_layer, quantize_nested
from decdec.testing import run_script

import cheatsheet
from cheatsheet import make_cheatsheet
from scaling import read_scaling, scale_model


def paper_row(row, bits):
    """The paper's search on one output channel, as it reads: 32 scales, mean squared error in float32, the first minimum."""
    top = 2 ** (bits - 1) - 1
    largest = (row.abs().max() / top).item()
    errors, tried = [], []
    for scale in torch.linspace(largest / 32, largest, 32):
        codes = torch.clamp(torch.round(row / scale), -top, top)
        errors.append(((row - codes * scale) ** 2).mean())
        tried.append((codes, scale))
    return tried[int(torch.stack(errors).argmin())]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("d_in", [33, 576, 1100])
def test_codes_and_scales_are_the_papers(bits, d_in):
    generator = torch.Generator().manual_seed(bits * d_in)
    residual = 0.003 * torch.randn(70, d_in, generator=generator)
    residual[5] *= 1 + 30 * (torch.rand(d_in, generator=generator) > 0.98)  # outliers, which the best scale clips
    codes, scales = ops.residual_quantize(residual, bits)
    for row, code, scale in zip(residual, codes, scales):
        wanted, step = paper_row(row, bits)
        assert torch.equal(code.float(), wanted)
        assert scale == step.half()


def test_half_precision_weights_give_the_papers_codes():
    generator = torch.Generator().manual_seed(3)
    original = (0.05 * torch.randn(40, 256, generator=generator)).half()
    error = original.float() - (torch.round(original.float() * 50) / 50).half().float()
    codes, scales = ops.residual_quantize(error, 4)
    for row, code, scale in zip(error, codes, scales):
        wanted, step = paper_row(row, 4)
        assert torch.equal(code.float(), wanted) and scale == step.half()


def test_rows_of_zeros_and_values_that_are_not_finite():
    residual = torch.zeros(3, 64)
    residual[1, 3] = 0.5
    codes, scales = ops.residual_quantize(residual, 4)
    assert scales[0] == 0 and not codes[0].any() and codes[1, 3] * scales[1] == 0.5
    residual[2, 0] = torch.nan
    for bits in (4, 16):
        with pytest.raises(UserError, match="finite"):
            pack_layer(residual, bits)


@pytest.mark.parametrize("method,bits,nested", [("squeezellm", 2, False), ("squeezellm", 4, False), ("awq", 8, False),
                                                ("awq", 16, False), ("awq", 4, True), ("rtn", 1, True), ("rtn", 2, True),
                                                ("rtn", 3, True), ("squeezellm", 2, True), ("squeezellm", 3, True)])
def test_residual_brings_the_weights_back(tiny, quantized, tmp_path, method, bits, nested):
    folder = quantized(method)
    quant = read_quant_config(folder)
    sheet = load_cheatsheet(make_cheatsheet(folder, bits=bits, nested=nested, out=tmp_path / "sheet.pt"), quant)
    assert (sheet.bits, sheet.nested) == (bits, nested)
    tensors = load_file(folder / "model.safetensors")
    model = scale_model(load_model(str(tiny), torch.float32), read_scaling(folder))
    parts = ("qweight", "codebook", "scale") if method == "squeezellm" else ("qweight", "scales", "zeros")
    dequantize = reference.codebook_dequantize if method == "squeezellm" else reference.uniform_dequantize
    for name, module in decoder_linears(model).items():
        dense = dequantize(*(tensors[f"{name}.{part}"] for part in parts), module.in_features, torch.float32)
        back = sheet.dequantize(name, len(dense)).t()
        left, wanted = (module.weight - dense - back).detach(), (module.weight - dense).detach()
        if bits == 16:
            torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=float(wanted.abs().max()) * 2**-10)
        elif nested and method == "squeezellm":
            width = sheet.scale[name].float().t() * sheet.row_scale[name]
            assert width.shape == dense.shape
            inside = wanted.abs() < width / 2
            assert (left.abs() <= width / 2**bits / 2 * 1.01)[inside].all() and inside.float().mean() > 0.8
        elif nested:
            step = tensors[f"{name}.scales"].float().t().repeat_interleave(module.in_features // len(tensors[f"{name}.scales"]), 1)
            inside = wanted.abs() < step / 2
            assert (left.abs() <= step / 2**bits / 2 * 1.01)[inside].all() and inside.float().mean() > 0.9
        else:
            scale, levels = sheet.scale[name].float().t(), 2 ** (bits - 1) - 1
            inside = wanted.abs() < scale * levels
            # Half a step, and what rounding the scale to float16 (perhaps a subnormal one) does to the largest code.
            assert (left.abs() <= 0.501 * scale + levels * (scale * 2**-11 + 2**-25))[inside].all()
            assert left.norm() < {2: 0.75, 4: 0.25, 8: 0.02}[bits] * wanted.norm()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "heavy", "even", "outliers"])
def test_the_fitted_interval_is_the_best_one(bits, kind):
    generator = torch.Generator().manual_seed(bits)
    normal, even = torch.randn(8, 500, generator=generator), torch.rand(8, 500, generator=generator)
    residual = 0.01 * {"normal": normal, "heavy": normal**3, "even": even - 0.5, "outliers": normal * (1 + 20 * (even > 0.99))}[kind]
    width = fit_interval(residual, bits)
    assert width.dtype == torch.float16 and width.shape == (1, 8)

    def error(width):  # to the nearest of the levels, one by one
        levels = [(c + 0.5) * width[:, None] / 2**bits for c in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]
        return torch.stack([residual - level for level in levels]).abs().amin(0).square().mean(1)

    largest = 2 * residual.abs().amax(1)
    least = torch.stack([error(largest * i / 1000) for i in range(1, 1001)]).amin(0)
    assert (error(width[0].float()) <= 1.01 * least).all()


def test_layers_that_read_one_input_share_the_sizes_of_its_rows(tiny, quantized, tmp_path):
    folder = quantized("squeezellm")
    sheet = load_cheatsheet(make_cheatsheet(folder, nested=True, out=tmp_path / "sheet.pt"), read_quant_config(folder))
    tensors = load_file(folder / "model.safetensors")
    sums = {}
    for name, module in decoder_linears(load_model(str(tiny), torch.float32)).items():
        dense = reference.codebook_dequantize(*(tensors[f"{name}.{part}"] for part in ("qweight", "codebook", "scale")),
                                              module.in_features, torch.float32)
        kind = {"q": "qkv", "k": "qkv", "v": "qkv", "g": "gu", "u": "gu"}.get(name.rpartition(".")[2][0], name.rpartition(".")[2])
        sums.setdefault((name.split(".")[2], kind), []).append((name, (module.weight - dense).detach().square().sum(0)))
    for members in sums.values():
        size = sum(square for _, square in members).sqrt()
        for name, _ in members:
            torch.testing.assert_close(sheet.row_scale[name], size / size.mean())


def test_a_channel_without_residual_has_no_width():
    rows, width = pack_layer(torch.zeros(16, 64), 2, nested=True)
    assert not width.any() and not reference.residual_dequantize(rows, width, 2, True, 16, torch.float32).any()


def test_nested_codes_of_fewer_bits_are_the_high_bits():
    residual = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    width = torch.full((4, 16), 2.0).half()
    four = quantize_nested(residual, width, 4)
    for bits in (1, 2, 3):
        assert torch.equal(quantize_nested(residual, width, bits), four >> (4 - bits))


def test_two_folders_give_the_same_cheatsheet_as_the_packed_one(tiny, quantized, tmp_path):
    folder = quantized("squeezellm")
    tensors = load_file(folder / "model.safetensors")
    fake = load_model(str(tiny), torch.float32)
    for name, module in decoder_linears(fake).items():
        module.weight.data = reference.codebook_dequantize(*(tensors[f"{name}.{part}"] for part in ("qweight", "codebook", "scale")),
                                                           module.in_features, torch.float32)
    fake.save_pretrained(tmp_path / "fake")
    one = torch.load(make_cheatsheet(folder, out=tmp_path / "one.pt"), weights_only=True)
    done = run_script(cheatsheet.__file__, "--original", tiny, "--quantized", tmp_path / "fake", "--out", tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert one["tensors"].keys() == two["tensors"].keys()
    assert all(torch.equal(one["tensors"][name], two["tensors"][name]) for name in one["tensors"])
    refused = run_script(cheatsheet.__file__, folder, "--original", tiny)
    assert refused.returncode == 1 and refused.stderr.splitlines()[-1].startswith("error: expected FOLDER, or --original, --quantized")


def test_originals_layout_is_as_its_program_reads_it_and_comes_back(quantized, tmp_path):
    folder = quantized("squeezellm")
    sheet = load_cheatsheet(make_cheatsheet(folder, out=tmp_path / "sheet.pt"), read_quant_config(folder))
    path = make_cheatsheet(folder, layout="original", out=tmp_path / "original.pt")
    blocks = torch.load(path, weights_only=True)
    assert len(blocks) == 2 and set(blocks[0]) == {f"self_attn.{p}_proj" for p in "qkvo"} | {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    entry = blocks[1]["mlp.up_proj"]
    codes = unpack_residual(sheet.residual["model.layers.1.mlp.up_proj"], 4, 1088)
    scale = sheet.scale["model.layers.1.mlp.up_proj"][0]
    assert entry["cheatsheet"].dtype == torch.int32 and entry["cheatsheet"].shape == (192, 136)
    for i, o in [(0, 0), (3, 7), (191, 1087), (17, 500)]:
        word = int(entry["cheatsheet"][i, o // 8]) & 0xFFFFFFFF
        assert (word >> 4 * (o % 8) & 0xF) - 8 == codes[i, o]
        assert entry["reordered_scales"][(o % 8) * 136 + o // 8] == scale[o]

    residual, scales = load_original_cheatsheet(path, "model.layers")
    assert residual.keys() == sheet.residual.keys()
    assert all(torch.equal(residual[name], sheet.residual[name]) and torch.equal(scales[name], sheet.scale[name]) for name in residual)

    largest = {"model.layers.0.a.b": torch.tensor([3.0, 2.0]), "model.layers.1.a.b": torch.tensor([5.0, 1.0])}
    save_original_thresholds(tmp_path / "t.pt", largest, "model.layers")
    assert torch.equal(torch.load(tmp_path / "t.pt", weights_only=True)[1]["a.b"], largest["model.layers.1.a.b"])
    back = load_original_thresholds(tmp_path / "t.pt", "model.layers")
    assert back.keys() == largest.keys() and all(torch.equal(back[name], largest[name]) for name in back)
    with pytest.raises(UserError, match="expected 'cheatsheet'"):
        load_original_cheatsheet(tmp_path / "t.pt", "model.layers")


def test_a_finished_cheatsheet_is_kept_and_another_is_made_anew(quantized, tmp_path):
    folder, out = quantized("rtn"), tmp_path / "sheet.pt"
    assert make_cheatsheet(folder, out=out) == out
    assert make_cheatsheet(folder, out=out) is None
    assert make_cheatsheet(folder, bits=8, out=out) == out
    out.write_bytes(out.read_bytes()[:1000])
    assert make_cheatsheet(folder, bits=8, out=out) == out
    assert make_cheatsheet(folder, bits=8, out=out) is None
