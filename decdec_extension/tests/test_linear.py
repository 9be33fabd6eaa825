"""The compensated layer against the formula of the paper, and fusing against packing."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from decdec import packing, reference
from decdec.artifacts import Thresholds
from decdec.errors import UserError
from decdec.linear import BASE_ROWS, FEW_ROWS, Compensation, CompensatedLinear, fuse
from decdec.placement import place_residuals

NAME = "model.layers.0.self_attn.q_proj"


def make_layer(d_in=1100, d_out=40, form="codebook", bits=3, residual_bits=4, seed=0, name=NAME, bias=True,
               group_size=100, row_scale=None):
    draw = torch.Generator().manual_seed(seed)
    packed = {"qweight": packing.pack_codes(torch.randint(0, 2**bits, (d_out, d_in), generator=draw), bits)}
    if form == "codebook":
        codebook, scale = packing.pack_codebook(torch.randn((d_out, 2**bits), generator=draw))
        packed |= {"codebook": codebook, "scale": scale}
    else:
        packed |= {"scales": torch.rand((d_in // group_size, d_out), generator=draw).half(),
                   "zeros": torch.randint(0, 2**bits, (d_in // group_size, d_out), generator=draw).half()}
    layer = CompensatedLinear(name, d_in, packed, torch.randn(d_out, generator=draw) if bias else None)
    if residual_bits == 16:
        layer.set_residual(packing.pack_residual(torch.randn((d_in, d_out), generator=draw), 16), None, 16, False)
    else:
        half = 2**(residual_bits - 1)
        codes = torch.randint(-half, half, (d_in, d_out), generator=draw)
        scale = torch.rand((1, d_out), generator=draw).half() / half
        layer.set_residual(packing.pack_residual(codes, residual_bits), scale, residual_bits, row_scale is not None, row_scale)
    layer.set_thresholds(torch.linspace(4, 0.01, d_in), torch.rand(d_in, generator=draw))
    return layer


def base_weight(layer):
    if layer.format == "codebook":
        return reference.codebook_dequantize(layer.qweight, layer.codebook, layer.scale, layer.in_features, torch.float)
    return reference.uniform_dequantize(layer.qweight, layer.scales, layer.zeros, layer.in_features, torch.float)


def expected(layer, x, channels):
    """The formula on each row, with ``channels`` a list of lists of selected channels."""
    weight, residual = base_weight(layer), reference.residual_dequantize(
        layer.residual, layer.residual_scale, layer.residual_bits, layer.nested, layer.out_features, torch.float32)
    if layer.row_scale is not None:
        residual = residual * layer.row_scale[:, None]
    rows = []
    for row, chosen in zip(x, channels):
        mask = torch.zeros(layer.in_features).index_fill_(0, torch.tensor(chosen, dtype=torch.long), 1.0)
        rows.append((weight + (residual * mask[:, None]).t()) @ row + (0 if layer.bias is None else layer.bias))
    return torch.stack(rows)


def selected(layer, x, selection, k_chunk):
    bounds = Thresholds({}, {NAME: torch.linspace(4, 0.01, layer.in_features)}, {}).boundaries(NAME, k_chunk)
    indices = reference.select_channels(x, k_chunk, *(bounds if selection == "bucket" else (None, None)))
    return [[i for i in row if i >= 0] for row in indices.tolist()]


@pytest.mark.parametrize("form, residual_bits", [("codebook", 4), ("uniform", 4), ("codebook", 16), ("uniform", 2)])
@pytest.mark.parametrize("selection, k_chunk", [("bucket", 8), ("exact", 8), ("exact", 1024)])
def test_decode_and_prefill_follow_the_formula(form, residual_bits, selection, k_chunk):
    layer = make_layer(form=form, residual_bits=residual_bits)
    layer.compensate(Compensation(k_chunk, selection, prefill=True))
    x = torch.randn((FEW_ROWS + 5, layer.in_features), generator=torch.Generator().manual_seed(1))
    want = expected(layer, x, selected(layer, x, selection, k_chunk))
    assert_close(layer(x), want, rtol=1e-4, atol=1e-3)  # by dequantizing
    assert_close(layer(x[:FEW_ROWS]), want[:FEW_ROWS], rtol=1e-4, atol=1e-3)  # by the op
    assert_close(layer(x[0]), want[0], rtol=1e-4, atol=1e-3)
    assert_close(layer(x[:, None]), want[:, None], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("residual_bits", [2, 3])
@pytest.mark.parametrize("selection", ["bucket", "exact"])
def test_rows_with_a_scale_of_their_own(residual_bits, selection):
    row_scale = torch.rand(1100, generator=torch.Generator().manual_seed(5)) * 4
    layer = make_layer(residual_bits=residual_bits, row_scale=row_scale)
    layer.compensate(Compensation(16, selection, prefill=True))
    x = torch.randn((FEW_ROWS + 5, layer.in_features), generator=torch.Generator().manual_seed(1))
    want = expected(layer, x, selected(layer, x, selection, 16))  # chosen by |x| alone
    assert_close(layer(x), want, rtol=1e-4, atol=1e-3)
    assert_close(layer(x[:FEW_ROWS]), want[:FEW_ROWS], rtol=1e-4, atol=1e-3)
    stream = torch.randn((1, layer.out_features))
    norm = torch.rand(layer.in_features) + 0.5
    normed = torch.nn.functional.rms_norm(x[:1], (layer.in_features,), norm, 1e-5)
    want = stream + expected(layer, normed, selected(layer, normed, selection, 16))
    assert_close(layer.step(x[:1], stream, (norm, 1e-5)), want, rtol=1e-4, atol=1e-3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, FEW_ROWS + 5])
def test_rows_with_a_scale_of_their_own_on_a_gpu(rows):
    layer = make_layer(d_in=1088, d_out=64, residual_bits=2, row_scale=torch.rand(1088) * 4).half()
    layer.compensate(Compensation(16, "exact", prefill=True))
    x = torch.randn((rows, 1088)).half()
    want = layer(x)
    got = layer.cuda()(x.cuda())
    assert got.is_cuda
    assert_close(got.cpu(), want, rtol=1e-2, atol=0.05 * float(want.abs().mean()))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moved_residuals_give_the_same_sums():
    layer = make_layer(d_in=1088, d_out=64).half().cuda()
    layer.compensate(Compensation(16, "exact"))
    x = torch.randn((1, 1088)).half().cuda()
    want, before = layer(x), torch.cuda.memory_allocated()
    for where in ("gpu", "host"):
        place_residuals([layer], where)
        assert torch.equal(layer(x), want)
        assert (torch.cuda.memory_allocated() >= before + layer.residual.nbytes) == (where == "gpu")


@pytest.mark.parametrize("rows", [1, 16])
def test_few_rows_have_the_gradient_of_the_weights(rows):
    layer = make_layer()
    layer.compensate(Compensation())
    x = torch.randn(rows, layer.in_features, requires_grad=True)
    out = layer(x)
    out.square().sum().backward()
    assert_close(x.grad, 2 * out.detach() @ base_weight(layer), rtol=1e-4, atol=1e-3)


def test_fused_layers_share_their_row_scale():
    row_scale = torch.rand(200)
    layers = [make_layer(200, width, residual_bits=2, row_scale=row_scale, seed=i, bias=False) for i, width in enumerate((32, 48))]
    fused = fuse(layers, "x.qkv_proj")
    for layer in (fused, *layers):
        layer.compensate(Compensation(64, "exact"))
    x = torch.randn((1, 200))
    assert_close(fused(x), torch.cat([layer(x) for layer in layers], dim=1), rtol=1e-5, atol=1e-4)
    other = make_layer(200, 48, residual_bits=2, row_scale=torch.rand(200))
    other.compensate(Compensation(64, "exact"))
    with pytest.raises(UserError, match="row scales"):
        fuse([layers[0], other], "x.qkv_proj")


def test_scales_of_a_nested_residual_are_the_bases_own():
    layer = make_layer(form="uniform")
    rows = packing.pack_residual(torch.zeros((1100, 40), dtype=torch.int8), 2)
    layer.set_residual(rows, layer.scales.clone(), 2, True)
    assert layer.residual_scale is layer.scales
    layer.set_residual(rows, layer.scales + 1, 2, True)
    assert layer.residual_scale is not layer.scales


@pytest.mark.parametrize("rows", [3, FEW_ROWS + 3, BASE_ROWS + 3])
def test_only_single_positions_are_compensated_unless_prefill_asks(rows):
    layer = make_layer()
    x = torch.randn((rows, layer.in_features))
    base = layer(x)
    assert_close(base, expected(layer, x, [[]] * rows), rtol=1e-4, atol=1e-3)
    layer.compensate(Compensation(8, "exact"))
    assert_close(layer(x[None]), base[None])
    decoded = layer(x[:, None])[:, 0]
    assert_close(decoded, expected(layer, x, selected(layer, x, "exact", 8)), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(decoded, base, atol=0.1)


@pytest.mark.parametrize("rows", [2, FEW_ROWS + 2])
def test_static_and_random_selection(rows):
    layer = make_layer()
    x = torch.randn((rows, 1, layer.in_features))
    layer.compensate(Compensation(8, "static"))
    ranking = layer.thresholds.mean_square[NAME].tolist()
    best = sorted(range(layer.in_features), key=lambda i: -ranking[i])[:8 + 1]
    assert_close(layer(x)[:, 0], expected(layer, x[:, 0], [best] * rows), rtol=1e-4, atol=1e-3)

    layer.compensate(Compensation(8, "random", seed=3))
    drawn = layer.channels(x[:, 0])
    for row in drawn.tolist():
        assert len(set(row)) == 9 and sum(i < 1024 for i in row) == 8 and all(0 <= i < 1100 for i in row)
    layer.compensate(Compensation(8, "random", seed=3))  # the same settings draw the same channels again
    assert_close(layer(x)[:, 0], expected(layer, x[:, 0], drawn.tolist()), rtol=1e-4, atol=1e-3)
    assert drawn[0].tolist() != drawn[1].tolist()


def test_layers_draw_apart_from_each_other():
    layers = [make_layer(name=name) for name in (NAME, NAME, NAME.replace("q_proj", "k_proj"))]
    x = torch.randn((2, 1100))
    drawn = []
    for layer in layers:
        layer.compensate(Compensation(8, "random", seed=3))
        drawn.append(layer.channels(x).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_all_channels_of_fp16_residuals_restore_full_precision():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn((24, 1100), generator=draw)
    layer = make_layer(d_out=24, residual_bits=16, bias=False)
    layer.set_residual(packing.pack_residual((weight - base_weight(layer)).t(), 16), None, 16, False)
    layer.compensate(Compensation(1024, "bucket"))
    x = torch.randn((2, 1, 1100), generator=draw)
    assert_close(layer(x), x @ weight.t(), rtol=1e-3, atol=0.1)
    assert (layer(x) - x @ weight.t()).abs().max() < 0.01 * (x @ base_weight(layer).t() - x @ weight.t()).abs().max()


def test_nan_and_inf_reach_the_output_and_are_not_selected():
    layer = make_layer(bias=False)
    layer.compensate(Compensation(8, "exact"))
    x = torch.randn((1, 1100))
    x[0, 5] = torch.inf
    out = layer(x)
    assert not out.isfinite().any()
    layer.compensate(Compensation(8, "exact", prefill=True))
    many = layer(x.repeat(FEW_ROWS + 1, 1).index_fill(0, torch.tensor([0]), 1.0))
    assert many[0].isfinite().all() and not many[1:].isfinite().any()
    x[0, :1000] = torch.nan  # fewer finite values in the first chunk than the 1024 asked for
    layer.compensate(Compensation(1024, "exact", prefill=True))
    assert torch.equal(layer._salient(x), x.nan_to_num(0.0))


@pytest.mark.parametrize("form, widths, residual_bits", list(itertools.product(
    ["codebook", "uniform"], [(32, 16, 48), (33, 7, 5)], [4, 2, 16])))
def test_fuse_then_pack_equals_pack_then_fuse(form, widths, residual_bits):
    layers = [make_layer(200, width, form, residual_bits=residual_bits, seed=i, bias=i == 1, name=f"x.{part}_proj")
              for i, (width, part) in enumerate(zip(widths, "qkv"))]
    fused = fuse(layers, "x.qkv_proj")
    codes = [packing.unpack_codes(layer.qweight, layer.out_features, 200) for layer in layers]
    assert torch.equal(fused.qweight, packing.pack_codes(torch.cat(codes), 3))
    unpacked = [packing.unpack_residual(layer.residual, residual_bits, layer.out_features) for layer in layers]
    assert torch.equal(fused.residual, packing.pack_residual(torch.cat(unpacked, dim=1), residual_bits))
    assert fused.parts == tuple((layer.name, layer.out_features) for layer in layers) and fused.kind == "qkv"
    x = torch.randn((1, 200))
    for setting in (Compensation(), Compensation(64, "bucket"), Compensation(64, "exact"), Compensation(1024)):
        fused.compensate(setting)
        for layer in layers:
            layer.thresholds = None
            layer.set_thresholds(fused.thresholds.largest[fused.name], fused.thresholds.mean_square[fused.name])
            layer.compensate(setting)
        assert_close(fused(x), torch.cat([layer(x) for layer in layers], dim=1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("selection", ["exact", "static"])
def test_inputs_in_an_order_of_the_packed_weights(selection):
    """A layer whose weights, rows and mean squares are permuted gives what the plain one gives, fused or not."""
    plain = [make_layer(200, width, "uniform", seed=i, name=f"x.{part}_proj") for i, (width, part) in enumerate(
        zip((32, 16), "qk"))]
    order = torch.randperm(200)
    layers = []
    for layer in plain:
        # A layer that takes its input i at place j = inverse[i]; all groups alike, so that they stay what they are.
        for part in ("scales", "zeros"):
            setattr(layer, part, getattr(layer, part)[:1].expand_as(getattr(layer, part)).contiguous())
        codes = packing.unpack_codes(layer.qweight, layer.out_features, 200)[:, order]
        packed = {"qweight": packing.pack_codes(codes, layer.bits), "scales": layer.scales, "zeros": layer.zeros}
        other = CompensatedLinear(layer.name, 200, packed | {"order": order.int()}, layer.bias)
        other.set_residual(layer.residual[order], layer.residual_scale, layer.residual_bits, layer.nested)
        seen = layer.thresholds
        other.set_thresholds(seen.largest[layer.name], seen.mean_square[layer.name][order])
        assert torch.equal(other.dequantize(torch.float32), layer.dequantize(torch.float32))
        layers.append(other)
    for rows in (1, 20):
        x = torch.randn((rows, 1, 200) if rows == 1 else (rows, 200))
        for setting in (Compensation(), Compensation(64, selection, prefill=True)):
            for layer in (*plain, *layers):
                layer.compensate(setting)
            want = torch.cat([layer(x) for layer in plain], dim=-1)
            assert_close(torch.cat([layer(x) for layer in layers], dim=-1), want, rtol=1e-4, atol=1e-4)
            if selection == "exact":
                assert_close(fuse(layers, "x.qkv_proj")(x), want, rtol=1e-4, atol=1e-4)
    x = torch.randn((1, 200))
    stream = torch.randn((1, 32))
    layers[0].bias = None
    assert_close(layers[0].step(x, stream), stream + layers[0](x), rtol=1e-4, atol=1e-4)
    layers[1].order = layers[1].order.flip(0)
    with pytest.raises(UserError, match="different orders"):
        fuse(layers, "x.qkv_proj")


def test_layers_that_differ_are_not_fused():
    with pytest.raises(UserError, match="bits differ"):
        fuse([make_layer(bits=3), make_layer(bits=4)], "x.qkv_proj")
    with pytest.raises(UserError, match="group sizes"):
        fuse([make_layer(form="uniform", group_size=100), make_layer(form="uniform", group_size=50)], "x.qkv_proj")


def test_casting_keeps_the_packed_form_and_leaves_residuals_where_they_are():
    layer = make_layer()
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items() if key != "bias"}
    residual, scale = layer.residual, layer.residual_scale.clone()
    layer.to(torch.bfloat16)
    assert all(torch.equal(layer.state_dict()[key], tensor) for key, tensor in before.items())
    assert layer.bias.dtype == torch.bfloat16
    assert layer.residual is residual and torch.equal(layer.residual_scale, scale)
    assert set(layer.state_dict()) == {"qweight", "codebook", "scale", "bias"}
    layer.compensate(Compensation(8, "exact"))
    x = torch.randn((1, 1100))
    assert_close(layer(x.bfloat16()).float(), layer.float()(x), rtol=0.05, atol=1.0)


def test_bad_settings_are_refused_in_words():
    for wrong, match in ((dict(k_chunk=-1), "0..1024"), (dict(k_chunk=1025), "0..1024"), (dict(k_chunk=1.5), "integer"),
                         (dict(selection="best"), "bucket, exact"), (dict(n_tb=0), "n_tb")):
        with pytest.raises(UserError, match=match):
            Compensation(**wrong)
    layer = make_layer()
    layer.residual = None
    with pytest.raises(UserError, match="cheatsheet"):
        layer.compensate(Compensation(8))
    layer = make_layer()
    layer.thresholds = None
    with pytest.raises(UserError, match="thresholds"):
        layer.compensate(Compensation(8, "bucket"))
    layer.compensate(Compensation(8, "exact"))
    with pytest.raises(UserError, match="another model"):
        layer.set_residual(torch.zeros((7, 16), dtype=torch.uint8), None, 4, False)


def test_refused_settings_change_nothing():
    layer = make_layer()
    layer.compensate(Compensation(8))
    before = layer.b_0, layer.b_15, layer.compensation
    with pytest.raises(UserError, match="repair"):
        layer.compensate(Compensation(16, repair=True))
    assert before == (layer.b_0, layer.b_15, layer.compensation)


def test_compiles():
    layer = make_layer(d_out=48)
    layer.compensate(Compensation(8, "bucket"))
    x = torch.randn((1, 1100))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-4)
