"""The CPU ops against the reference, where results are exact, and against float64 products, where they are rounded.

Tolerance of a rounded result: twice the error of PyTorch's own product in the same precision. Where few outputs are
compared PyTorch may be lucky, so one rounding of the output and half a float32 rounding of the sum of all |terms| are
allowed besides.
"""

import math

import pytest
import torch

from decdec import _library, ops, packing, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
D_IN = (1, 63, 64, 576, 1024, 1025, 1536, 2500)
D_OUT = (1, 15, 17, 192, 576)
SHAPES = [(d_in, D_OUT[i % len(D_OUT)]) for i, d_in in enumerate(D_IN)]


def gemv(base):
    return ops.codebook_gemv if base.form == "codebook" else ops.uniform_gemv


def compensated(base):
    return ops.codebook_gemv_compensated if base.form == "codebook" else ops.uniform_gemv_compensated


def assert_as_good(out, bias, *terms):
    """``out`` is the sum of ``x @ dense`` over ``terms`` (x, dense), float64, and ``bias``, within the tolerance."""
    dtype = out.dtype
    truth = sum(x.double() @ dense for x, dense in terms)
    pytorch = sum(x.to(dtype) @ dense.to(dtype) for x, dense in terms)
    sum_of_terms = sum(x.double().abs() @ dense.abs() for x, dense in terms).max()
    if bias is not None:
        truth, pytorch = truth + bias.double(), pytorch + bias
    assert out.shape == truth.shape
    error, allowed = ((result.double() - truth).abs().max() for result in (out, pytorch))
    slack = torch.finfo(dtype).eps * truth.abs().max() + 2**-24 * sum_of_terms
    assert error <= 2 * allowed + slack, f"error {error:.3g}, PyTorch's {allowed:.3g}"


def masked(x, indices, center=None, row_scale=None):
    """``(x - center) * row_scale`` in float64 at the selected channels, 0 elsewhere."""
    x = x.double() if center is None else x.double() - center.double()
    x = x if row_scale is None else x * row_scale.double()
    mask = torch.zeros_like(x, dtype=torch.bool)
    for row, chosen in enumerate(indices.long()):
        mask[row, chosen[chosen >= 0]] = True
    return torch.where(mask, x, 0)


def group_sizes(d_in):
    """Below a half unit of the layout, a multiple of it, and one group for all, as far as they divide ``d_in``."""
    return [next(size for size in sizes if d_in % size == 0) for sizes in ((5, 24, 1), (32, 41, 7, 50, 1), (d_in,))]


@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize("d_in, d_out", SHAPES)
def test_dequantize_is_exact(make_base, d_in, d_out, bits):
    for dtype, group_size in zip(DTYPES, group_sizes(d_in)):
        codebook = make_base("codebook", d_in, d_out, bits).args
        expected = reference.codebook_dequantize(*codebook, d_in, dtype)
        assert torch.equal(ops.codebook_dequantize(*codebook, d_in, dtype), expected)
        uniform = make_base("uniform", d_in, d_out, bits, group_size).args
        expected = reference.uniform_dequantize(*uniform, d_in, dtype)
        assert torch.equal(ops.uniform_dequantize(*uniform, d_in, dtype), expected)


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("bits", (1, 2, 3, 4, 8, 16))
def test_residual_dequantize_is_exact(make_residual, bits, nested):
    for d_in, d_out, groups in ((1, 1, 1), (6, 15, 3), (40, 17, 1), (64, 192, 4), (30, 577, 30)):
        residual = make_residual(d_in, d_out, bits, groups, nested)
        for dtype in DTYPES:
            expected = reference.residual_dequantize(*residual.args, d_out, dtype)
            assert torch.equal(ops.residual_dequantize(*residual.args, d_out, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize("d_in, d_out", SHAPES)
def test_base_gemv(make_base, d_in, d_out, bits, dtype):
    group_size = group_sizes(d_in)[DTYPES.index(dtype)]
    for i, form in enumerate(("codebook", "uniform")):
        base = make_base(form, d_in, d_out, bits, group_size)
        batch = 1 + (d_in + bits + 4 * i) % 9
        x = torch.randn(batch, d_in).to(dtype)
        bias = torch.randn(d_out).to(dtype) if i % 2 else None
        assert_as_good(gemv(base)(x, *base.args, bias), bias, (x, base.dense.t()))


@pytest.mark.parametrize("boundaries", ((), (3.5, 2.0), (2.0, 2.0), (0.0, 0.0), (100.0, 1e-3)))
@pytest.mark.parametrize("k_chunk", (0, 1, 8, 100, 1024))
@pytest.mark.parametrize("d_in", D_IN)
def test_selection_is_exact(d_in, k_chunk, boundaries):
    limits = boundaries or (None, None)
    for dtype, center in zip(DTYPES, (None, torch.randn(d_in), None)):
        x = torch.randn(3, d_in).to(dtype)
        x[1] = (x[1] * 2).round() / 2  # many ties
        x[2] *= torch.finfo(dtype).tiny  # denormal
        out = ops.select_channels(x, k_chunk, *limits, center)
        assert torch.equal(out, reference.select_channels(x, k_chunk, *limits, center))


@pytest.mark.parametrize("boundaries", ((3.5, 2.0), (1.0, 1.0), (7.3, 0.1)))
def test_values_on_and_beside_the_bucket_floors(boundaries):
    floors = reference.bucket_floors(*boundaries)
    values = torch.cat([floors, floors.nextafter(torch.tensor(torch.inf)), floors.nextafter(torch.tensor(0.0))])
    x = values[torch.randperm(len(values))][None]
    for count in range(1, len(values) + 1):  # the cut goes through every bucket
        k_chunk = 1024 * count // len(values)
        assert torch.equal(ops.select_channels(x, k_chunk, *boundaries), reference.select_channels(x, k_chunk, *boundaries))


@pytest.mark.parametrize("boundaries", ((), (3.5, 2.0)))
def test_nan_and_inf_are_never_selected(boundaries):
    x = torch.randn(4, 2100)
    x[0, ::3] = torch.nan
    x[1, ::2] = torch.inf
    x[2, 5:1020] = -torch.inf  # fewer finite values than asked for
    x[3] = torch.nan
    out = ops.select_channels(x, 64, *boundaries)
    assert torch.equal(out, reference.select_channels(x, 64, *boundaries))
    chosen = torch.gather(x, 1, out.clamp(min=0).long())
    assert chosen[out >= 0].isfinite().all()
    assert (out[2, :64] >= 0).sum() == 9 and (out[2, 64:] >= 0).all()
    assert out[3].eq(-1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("bits", (1, 2, 3, 4, 8, 16))
def test_residual_gemv(make_residual, bits, nested, dtype):
    for d_in, d_out, k, groups in ((1, 1, 1, 1), (63, 15, 8, 1), (576, 192, 60, 9), (2500, 33, 300, 1), (8, 577, 0, 2)):
        residual = make_residual(d_in, d_out, bits, groups, nested)
        x, center, row_scale = torch.randn(3, d_in).to(dtype), torch.randn(d_in), torch.rand(d_in) * 4
        indices = torch.stack([torch.randperm(d_in)[:k].sort().values for _ in range(3)]).to(torch.int32)
        indices[1:, k // 2:] = -1
        for given in ((None, None), (center, None), (None, row_scale), (center, row_scale)):
            out = ops.residual_gemv(x, indices, *residual.args, d_out, *given)
            assert_as_good(out, None, (masked(x, indices, *given), residual.dense))


def test_residual_gemv_takes_indices_in_any_order(make_residual):
    residual = make_residual(600, 40, 4, groups=6)
    x, order = torch.randn(1, 600), torch.randperm(600)[None].to(torch.int32)
    assert_as_good(ops.residual_gemv(x, order, *residual.args, 40), None, (x, residual.dense))


CASES = [  # form, d_in, d_out, bits, group size, residual bits, residual groups, nested, k_chunk, boundaries
    ("codebook", 1, 1, 3, None, 4, 1, False, 1, ()),
    ("codebook", 63, 15, 2, None, 4, 1, False, 8, ()),
    ("codebook", 64, 17, 4, None, 2, 1, False, 1024, (2.0, 1.5)),
    ("codebook", 576, 192, 3, None, 4, 1, False, 8, (3.5, 2.5)),
    ("codebook", 1025, 17, 3, None, 1, 1, False, 100, ()),
    ("codebook", 1536, 576, 3, None, 4, 1, False, 0, ()),
    ("codebook", 2500, 192, 4, None, 8, 1, False, 1, (3.5, 2.5)),
    ("codebook", 2500, 576, 3, None, 16, 1, False, 8, ()),
    ("codebook", 576, 192, 3, None, 2, 1, True, 16, (3.5, 2.5)),
    ("codebook", 1025, 200, 3, None, 3, 1, True, 16, ()),
    ("uniform", 64, 17, 3, 64, 4, 1, False, 8, ()),
    ("uniform", 576, 131, 3, 64, 3, 9, True, 8, (3.5, 2.5)),
    ("uniform", 576, 192, 3, 64, 4, 9, True, 8, (3.5, 2.5)),
    ("uniform", 1024, 15, 4, 128, 1, 8, True, 1024, ()),
    ("uniform", 1536, 576, 2, 32, 2, 48, True, 64, (3.5, 2.5)),
    ("uniform", 2500, 1, 3, 5, 16, 1, False, 8, ()),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:9])))
def test_compensated_gemv(make_base, make_residual, case, dtype):
    form, d_in, d_out, bits, group_size, residual_bits, groups, nested, k_chunk, boundaries = case
    base = make_base(form, d_in, d_out, bits, group_size)
    residual = make_residual(d_in, d_out, residual_bits, groups, nested)
    for batch, with_bias, with_center, scaled in (
            (1, True, False, False), (3, False, True, True), (9, True, True, False), (2, True, False, True)):
        x = torch.randn(batch, d_in).to(dtype)
        bias = torch.randn(d_out).to(dtype) if with_bias else None
        center = torch.randn(d_in) if with_center else None
        row_scale = torch.rand(d_in) * 4 if scaled else None
        limits = boundaries or (None, None)
        out = compensated(base)(x, *base.args, bias, *residual.args, k_chunk, *limits, center, row_scale=row_scale)
        values = masked(x, reference.select_channels(x, k_chunk, *limits, center), center, row_scale)
        assert_as_good(out, bias, (x, base.dense.t()), (values, residual.dense))


@pytest.mark.parametrize("form, bits", (("codebook", 3), ("uniform", 4)))
def test_all_channels_with_exact_residuals_give_the_full_precision_product(make_base, form, bits):
    d_in, d_out = 1100, 70
    base = make_base(form, d_in, d_out, bits, 100)
    weight = base.dense + torch.randn(d_out, d_in) * 0.1
    residual = packing.pack_residual((weight - base.dense).t().contiguous(), 16)
    x = torch.randn(2, d_in)
    out = compensated(base)(x, *base.args, None, residual, None, 16, False, 1024)
    # A float16 residual is off by 2**-11 of itself at most; the float32 sums are far more precise.
    bound = x.double().abs() @ (weight - base.dense).abs().t() * 2**-11 + x.double().abs() @ weight.abs().t() * 2**-20
    assert ((out.double() - x.double() @ weight.t()).abs() <= bound).all()
    assert not torch.allclose(out.double(), x.double() @ base.dense.t(), atol=0.1)


def test_without_channels_the_base_is_untouched(make_base, make_residual):
    base, residual = make_base("codebook", 576, 192, 3), make_residual(576, 192, 4)
    x = torch.randn(2, 576)
    assert torch.equal(compensated(base)(x, *base.args, None, *residual.args, 0), gemv(base)(x, *base.args))


@pytest.mark.parametrize("form", ("codebook", "uniform"))
def test_a_row_is_the_same_in_any_batch_and_with_any_threads(make_base, make_residual, form):
    base, residual = make_base(form, 1536, 576, 3, 64), make_residual(1536, 576, 4)
    x = torch.randn(9, 1536)
    together = compensated(base)(x, *base.args, None, *residual.args, 8)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for row in range(9):
                alone = compensated(base)(x[row:row + 1], *base.args, None, *residual.args, 8)
                assert torch.equal(alone[0], together[row])
    finally:
        torch.set_num_threads(threads)


def test_nan_and_inf_reach_the_output_through_the_base_alone(make_base, make_residual):
    base, residual = make_base("codebook", 1536, 64, 3), make_residual(1536, 64, 4)
    x = torch.randn(3, 1536)
    x[1, 7], x[2, 1200] = torch.nan, torch.inf
    out = compensated(base)(x, *base.args, None, *residual.args, 8)
    expected = reference.codebook_gemv_compensated(x, *base.args, None, *residual.args, 8)
    assert out[0].isfinite().all() and out[1].isnan().all() and not out[2].isfinite().any()
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-3, equal_nan=True)


def test_an_empty_batch_gives_an_empty_output(make_base, make_residual):
    base, residual = make_base("uniform", 128, 40, 4), make_residual(128, 40, 4)
    x = torch.empty(0, 128)
    assert compensated(base)(x, *base.args, None, *residual.args, 8).shape == (0, 40)
    assert ops.select_channels(x, 8).shape == (0, 1)


def test_strided_x_is_taken(make_base):
    base = make_base("codebook", 576, 40, 3)
    wide = torch.randn(3, 1152)
    assert torch.equal(gemv(base)(wide[:, ::2], *base.args), gemv(base)(wide[:, ::2].contiguous(), *base.args))


def test_counts_of_a_narrow_last_chunk():
    x = torch.randn(1, 1024 + 100)
    for k_chunk in (1, 8, 11, 1024):
        assert ops.select_channels(x, k_chunk).shape[1] == k_chunk + math.ceil(k_chunk * 100 / 1024)


def test_a_missing_library_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    with pytest.raises(ImportError, match="build them with: pip install --no-build-isolation ./decdec_extension"):
        _library.load()


def test_the_library_knows_whether_it_has_cuda_kernels():
    assert torch.ops.decdec.has_cuda() == torch._C._dispatch_has_kernel_for_dispatch_key("decdec::codebook_gemv", "CUDA")


@pytest.mark.parametrize("bits", [4, 8])
def test_residuals_near_the_smallest_numbers(bits):
    row = torch.randn(1, 256)
    row[0, 0] = 8
    for largest in (1.01e-30, 2e-30, 3e-30):  # below what float32 can count the steps of
        codes, scales = ops.residual_quantize(row * (largest / 8), bits)
        assert not codes.any() and not scales.any()
    codes, scales = ops.residual_quantize(row * 2.0**-90, bits)
    assert torch.equal(codes, ops.residual_quantize(row, bits)[0]) and not scales.any()
