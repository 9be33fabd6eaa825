"""The CUDA ops against the fp32 reference and float64 products, and against the CPU ops, over random and awkward cases.

Without a GPU they run in the emulation (emulated/emulator.h), with fewer cases; what only a GPU has is skipped then.
Outputs are poisoned: the allocator's free memory and the SMs' shared memory are filled with NaN before each call, the
workspace must be all zero after it.
``DECDEC_CASES`` sets the number of random cases, ``DECDEC_SEED`` where they start, ``DECDEC_YARDSTICK`` the device of the
products that results are measured by; on the CPU shared memory is not filled either (compute-sanitizer's racecheck
fails inside cuBLAS).
"""

import os
import random

import pytest
import torch

from decdec import ops, reference
from decdec.testing import poison_shared_memory

GPU = torch.cuda.is_available() and torch.ops.decdec.has_cuda()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = [] if GPU else [pytest.mark.usefixtures("emulation")]
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")
DTYPES = (torch.float16, torch.bfloat16)
CASES = int(os.environ.get("DECDEC_CASES", "300" if GPU else "30"))
YARDSTICK = os.environ.get("DECDEC_YARDSTICK", DEVICE)


def placed(value):
    """Tensors, also of a tuple, where the ops run; the rest as it is."""
    if isinstance(value, tuple):
        return tuple(placed(item) for item in value)
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def poison(elements=1 << 20):
    """Leave NaN in the memory that the next outputs are made of, and in shared memory."""
    if YARDSTICK == "cuda":
        poison_shared_memory()
    blocks = [torch.full((size,), torch.nan, device=DEVICE) for size in (64, 4096, elements)]
    del blocks


def gemv(form):
    return ops.codebook_gemv if form == "codebook" else ops.uniform_gemv


def compensated(form):
    return ops.codebook_gemv_compensated if form == "codebook" else ops.uniform_gemv_compensated


def assert_as_good(out, bias, *terms, entry_error=0.0):
    """Twice the error of PyTorch's own product in the same precision, one rounding of the output and half a float32
    rounding of the sum of all |terms| besides, for where PyTorch is lucky; and float32 roundings of the largest |x|,
    for residual codes are summed with an offset. ``entry_error``: how far an entry of the first term's codebooks may be
    off; the errors of its weights add like random ones."""
    out, bias = out.to(YARDSTICK), None if bias is None else bias.to(YARDSTICK)
    terms = [(x.to(YARDSTICK), dense.to(YARDSTICK)) for x, dense in terms]
    dtype = out.dtype
    truth = sum(x.double() @ dense for x, dense in terms)
    pytorch = sum(x.to(dtype) @ dense.to(dtype) for x, dense in terms)
    magnitude = sum(x.double().abs() @ dense.abs() for x, dense in terms)
    if bias is not None:
        truth, pytorch = truth + bias.double(), pytorch + bias
    assert out.shape == truth.shape
    inside = truth.abs() < 0.9 * torch.finfo(dtype).max  # large random inputs overflow float16, rightly
    assert out[inside].isfinite().all()
    if not inside.any():
        return
    error, allowed = ((result.double() - truth)[inside].abs().nan_to_num(0).max() for result in (out, pytorch))
    slack = torch.finfo(dtype).eps * truth[inside].abs().max() + 2**-20 * magnitude.max()
    slack += 2**-19 * max(x.double().abs().max() for x, _ in terms)
    slack += 2 * entry_error * terms[0][0].double().norm(dim=1).max()
    assert error <= 2 * allowed + slack, f"error {error:.3g}, PyTorch's {allowed:.3g}, slack {slack:.3g}"


def masked(x, indices, center=None, row_scale=None):
    """``(x - center) * row_scale`` in float64 at the selected channels, 0 elsewhere."""
    x = x.double() if center is None else (x.float() - center).double()
    x = x if row_scale is None else x * row_scale.double()
    mask = torch.zeros_like(x, dtype=torch.bool)
    for row, chosen in enumerate(indices.long()):
        mask[row, chosen[chosen >= 0]] = True
    return torch.where(mask, x, 0)


def random_case(draw, make_base, make_residual):
    """One random compensated GEMV, checked; returns what it was."""
    form = draw.choice(("codebook", "uniform"))
    d_in = draw.choice((1, 8, 63, 64, 200, 576, 1000, 1024, 1032, 2048, 2500, 4096, 5120))
    d_out = draw.choice((1, 2, 15, 16, 17, 50, 192, 577, 1024))
    bits, batch, dtype = draw.choice((2, 3, 4)), draw.randint(1, 8), draw.choice(DTYPES)
    sizes = [size for size in (d_in, 5, 16, 32, 64, 96, 128, 256, 512) if d_in % size == 0]
    group_size = draw.choice(sizes)
    residual_bits, nested = draw.choice((1, 2, 3, 4, 4, 8, 16)), draw.random() < 0.3
    groups = d_in // draw.choice(sizes) if draw.random() < 0.4 else 1
    k_chunk, n_tb = draw.choice((0, 1, 3, 8, 32, 100, 1024)), draw.choice((1, 2, 8, 16, 100, 300, 5000))
    limits = draw.choice(((None, None), (3.5, 2.0), (1.0, 1.0)))
    what = dict(
        form=form,
        d_in=d_in,
        d_out=d_out,
        bits=bits,
        batch=batch,
        dtype=dtype,
        group_size=group_size,
        k_chunk=k_chunk,
        residual_bits=residual_bits,
        nested=nested,
        groups=groups,
        n_tb=n_tb,
        limits=limits,
    )
    base = make_base(form, d_in, d_out, bits, group_size)
    residual = make_residual(d_in, d_out, residual_bits, groups, nested)
    x = (torch.randn(batch, d_in) * draw.choice((1e-4, 1.0, 30.0))).to(dtype).to(DEVICE)
    if draw.random() < 0.3:
        x[:, draw.randrange(d_in)] *= 50  # an outlier channel
    bias = torch.randn(d_out).to(dtype).to(DEVICE) if draw.random() < 0.5 else None
    center = torch.randn(d_in).to(DEVICE) if draw.random() < 0.3 else None
    row_scale = (torch.rand(d_in) * 4).to(DEVICE) if draw.random() < 0.3 else None
    workspace = torch.zeros(8 * d_out * batch, dtype=torch.uint8, device=DEVICE) if draw.random() < 0.7 else None
    poison()
    out = compensated(form)(
        x, *placed(base.args), bias, *placed(residual.args), k_chunk, *limits, center, n_tb, workspace, row_scale=row_scale
    )
    indices = ops.select_channels(x, k_chunk, *limits, center)
    try:
        assert workspace is None or not workspace.any(), "workspace not zero"
        assert torch.equal(
            indices.cpu(),
            reference.select_channels(x.cpu(), k_chunk, *limits, None if center is None else center.cpu()),
        )
        values = masked(x, indices, center, row_scale)
        # Four-bit codebooks are looked up with 14 of their 16 bits (RowTable in codes.cuh).
        entry_error = 1.5 * float(base.args[2].max()) if form == "codebook" and bits == 4 else 0.0
        assert_as_good(out, bias, (x, base.dense.t().to(DEVICE)), (values, residual.dense.to(DEVICE)), entry_error=entry_error)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error


def test_random_cases(make_base, make_residual):
    draw = random.Random(int(os.environ.get("DECDEC_SEED", "0")))
    for _ in range(CASES):
        random_case(draw, make_base, make_residual)


@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize("d_in, d_out", ((1, 1), (63, 15), (576, 192), (1025, 17), (2500, 576)))
def test_dequantize_is_exact(make_base, d_in, d_out, bits):
    for dtype in (*DTYPES, torch.float32):
        for form in ("codebook", "uniform"):
            base = make_base(form, d_in, d_out, bits, next(size for size in (64, 41, 50, 1) if d_in % size == 0))
            op = ops.codebook_dequantize if form == "codebook" else ops.uniform_dequantize
            expected = (reference.codebook_dequantize if form == "codebook" else reference.uniform_dequantize)(
                *base.args, d_in, dtype
            )
            poison()
            assert torch.equal(op(*placed(base.args), d_in, dtype).cpu(), expected)


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("bits", (1, 2, 3, 4, 8, 16))
def test_residual_dequantize_is_exact(make_residual, bits, nested):
    for d_in, d_out, groups in ((1, 1, 1), (6, 15, 3), (40, 17, 1), (64, 192, 4), (30, 577, 30)):
        residual = make_residual(d_in, d_out, bits, groups, nested)
        for dtype in (*DTYPES, torch.float32):
            poison()
            expected = reference.residual_dequantize(*residual.args, d_out, dtype)
            assert torch.equal(ops.residual_dequantize(*placed(residual.args), d_out, dtype).cpu(), expected)


@pytest.mark.parametrize("form", ("codebook", "uniform"))
@pytest.mark.parametrize(
    "d_in, d_out",
    (
        pytest.param(4096, 4096, marks=needs_gpu),
        pytest.param(14336, 1040, marks=needs_gpu),
        pytest.param(3584, 4608, marks=needs_gpu),
        (28672, 80),
        (32768, 48),
    ),
)
def test_layers_of_models(make_base, d_in, d_out, form):
    for bits, batch, dtype in ((3, 1, torch.float16), (4, 8, torch.bfloat16), (2, 3, torch.float16)):
        base = make_base(form, d_in, d_out, bits, 128)
        x = torch.randn(batch, d_in, device=DEVICE).to(dtype)
        poison()
        assert_as_good(gemv(form)(x, *placed(base.args)), None, (x, base.dense.t().to(DEVICE)))


@pytest.mark.parametrize("groups", (1, 4))
@pytest.mark.parametrize("form", ("codebook", "uniform"))
def test_two_blocks_an_sm(make_base, make_residual, form, groups):
    """So many outputs that an SM takes two blocks where it can, and inputs that end within a batch of a warp."""
    d_in, d_out = 320, 20000 if GPU else 500
    base, residual = make_base(form, d_in, d_out, 3, 64), make_residual(d_in, d_out, 4, groups)
    for batch, n_tb in ((1, 3), (1, 24), (2, 40)):
        x = torch.randn(batch, d_in, device=DEVICE).half()
        poison()
        assert_as_good(gemv(form)(x, *placed(base.args)), None, (x, base.dense.t().to(DEVICE)))
        poison()
        out = compensated(form)(x, *placed(base.args), None, *placed(residual.args), 32, n_tb=n_tb)
        values = masked(x, ops.select_channels(x, 32))
        assert_as_good(out, None, (x, base.dense.t().to(DEVICE)), (values, residual.dense.to(DEVICE)))


def test_a_slice_of_more_pieces_than_threads(make_base, make_residual):
    """One block fetches rows so wide that it takes them in parts, whose sums have the same place."""
    base, residual = make_base("codebook", 64, 33000, 2), make_residual(64, 33000, 4)
    x = torch.randn(2, 64, device=DEVICE).half()
    poison()
    out = ops.codebook_gemv_compensated(x, *placed(base.args), None, *placed(residual.args), 256, n_tb=1)
    values = masked(x, ops.select_channels(x, 256))
    assert_as_good(out, None, (x, base.dense.t()), (values, residual.dense))


@pytest.mark.skipif(GPU, reason="a device of the emulation")
@pytest.mark.parametrize("form, bits", (("codebook", 3), ("codebook", 4), ("uniform", 3), ("uniform", 4)))
@pytest.mark.parametrize("d_in, batch, k_chunk", ((14336, 1, 8), (2048, 8, 32), (8192, 5, 1024)))
def test_gpus_of_less_shared_memory(emulation, make_base, make_residual, form, bits, d_in, batch, k_chunk):
    """RTX 30, 40 and 50: long rows in panels, several rows in parts, selected values read again."""
    emulation(sms=4, shared_per_sm=100 << 10, shared_per_block=99 << 10, major=8)
    base, residual = make_base(form, d_in, 80, bits, 128), make_residual(d_in, 80, 4)
    x = torch.randn(batch, d_in).half()
    out = compensated(form)(x, *base.args, None, *residual.args, k_chunk, n_tb=2)
    entry_error = 1.5 * float(base.args[2].max()) if form == "codebook" and bits == 4 else 0.0
    values = masked(x, reference.select_channels(x, k_chunk))
    assert_as_good(out, None, (x, base.dense.t()), (values, residual.dense), entry_error=entry_error)


@pytest.mark.parametrize("boundaries", ((None, None), (3.5, 2.0), (2.0, 2.0), (0.0, 0.0), (100.0, 1e-3)))
@pytest.mark.parametrize("k_chunk", (0, 1, 8, 100, 1024))
def test_selection_is_exact(k_chunk, boundaries):
    for d_in in (1, 63, 1000, 1024, 1025, 2500, 8192):
        for dtype in DTYPES:
            x = torch.randn(5, d_in).to(dtype)
            x[1] = (x[1] * 2).round() / 2  # many ties
            x[2] *= torch.finfo(dtype).tiny  # denormal
            x[3, ::3], x[4, 5:1020] = torch.nan, -torch.inf
            for center in (None, torch.randn(d_in)):
                out = ops.select_channels(x.to(DEVICE), k_chunk, *boundaries, placed(center))
                assert torch.equal(out.cpu(), reference.select_channels(x, k_chunk, *boundaries, center))


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("bits", (1, 2, 3, 4, 8, 16))
def test_residual_gemv(make_residual, bits, nested):
    for d_in, d_out, k, groups in ((1, 1, 1, 1), (63, 15, 8, 1), (576, 192, 60, 9), (2500, 33, 300, 1), (8, 577, 0, 2)):
        residual = make_residual(d_in, d_out, bits, groups, nested)
        for dtype in DTYPES:
            x, center = torch.randn(3, d_in).to(dtype).to(DEVICE), torch.randn(d_in).to(DEVICE)
            row_scale = (torch.rand(d_in) * 4).to(DEVICE)
            indices = torch.stack([torch.randperm(d_in)[:k] for _ in range(3)]).to(torch.int32)
            indices[1:, k // 2 :] = -1
            for given in ((None, None), (center, None), (None, row_scale), (center, row_scale)):
                poison()
                out = ops.residual_gemv(x, indices.to(DEVICE), *placed(residual.args), d_out, *given)
                assert_as_good(out, None, (masked(x, indices.to(DEVICE), *given), residual.dense.to(DEVICE)))


@pytest.mark.parametrize(
    "form, bits, group_size", (("codebook", 3, None), ("codebook", 4, None), ("uniform", 4, 64), ("uniform", 3, 24))
)
def test_nan_and_inf_give_what_the_base_formula_gives(make_base, make_residual, form, bits, group_size):
    d_in, d_out = 1536, 64
    base, residual = make_base(form, d_in, d_out, bits, group_size), make_residual(d_in, d_out, 4)
    if form == "codebook":
        base.args[1][:8] = 0  # rows of zero weights: 0 * Inf is NaN
    for dtype in DTYPES:
        x = torch.randn(5, d_in).to(dtype)
        x[1, 7], x[2, 1200], x[3, 3], x[3, 900] = torch.nan, torch.inf, torch.inf, -torch.inf
        expected = getattr(reference, f"{form}_gemv_compensated")(x, *base.args, None, *residual.args, 8).to(DEVICE)
        out = compensated(form)(x.to(DEVICE), *placed(base.args), None, *placed(residual.args), 8)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out[2:4][out[2:4].isinf()], expected[2:4][expected[2:4].isinf()])
        assert torch.allclose(out[::4], expected[::4], rtol=2e-2, atol=2e-2 * float(expected[::4].abs().max()))


def layer_call(make_base, make_residual, d_in=2048, d_out=512, batch=1):
    base, residual = make_base("codebook", d_in, d_out, 3), make_residual(d_in, d_out, 4)
    args, rest = placed(base.args), placed(residual.args)
    workspace = torch.zeros(8 * d_out * batch, dtype=torch.uint8, device=DEVICE)
    return lambda x, space=workspace: compensated("codebook")(x, *args, None, *rest, 16, n_tb=4, workspace=space)


def test_same_inputs_same_bits(make_base, make_residual):
    call = layer_call(make_base, make_residual)
    x = torch.randn(1, 2048, device=DEVICE).half()
    first = call(x)
    assert all(torch.equal(call(x), first) for _ in range(300 if GPU else 3))


def test_a_row_is_the_same_in_any_batch(make_base, make_residual):
    call = layer_call(make_base, make_residual, batch=2)
    x = torch.randn(2, 2048, device=DEVICE).half()
    together = call(x)
    assert all(torch.equal(call(x[row : row + 1])[0], together[row]) for row in range(2))


@needs_gpu
def test_graph_capture(make_base, make_residual):
    call = layer_call(make_base, make_residual)
    x = torch.randn(1, 2048, device=DEVICE).half()
    call(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chained = call(x)
        out = call(torch.cat([chained, chained.neg(), chained, chained], dim=1))
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        first = call(x)
        assert torch.equal(out, call(torch.cat([first, first.neg(), first, first], dim=1)))


@needs_gpu
def test_two_streams(make_base, make_residual):
    call = layer_call(make_base, make_residual)
    inputs = [torch.randn(1, 2048, device=DEVICE).half() for _ in range(2)]
    expected = [call(x) for x in inputs]
    spaces = [torch.zeros(8 * 512, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(100):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(call(inputs[i], spaces[i]))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected[i]) for i in range(2) for out in results[i])


def test_dependent_calls_in_a_row(make_base):
    """A kernel may start before the one ahead of it has ended: each must still see the other's output."""
    base = make_base("codebook", 1024, 1024, 3)
    args = (*placed(base.args)[:2], placed(base.args)[2] * 0.02)
    x = start = torch.randn(1, 1024, device=DEVICE).half()
    outs = []
    for _ in range(50 if GPU else 3):
        x = ops.codebook_gemv(x, *args)
        outs.append(x)
    again = start
    for out in outs:
        again = ops.codebook_gemv(again, *args)
        assert torch.equal(again.cpu(), out.cpu())


@needs_gpu
def test_compile_fullgraph(make_base, make_residual):
    call = layer_call(make_base, make_residual)
    x = torch.randn(1, 2048, device=DEVICE).half()
    compiled = torch.compile(lambda x: call(x * 2) + 1, fullgraph=True)
    assert torch.allclose(compiled(x), call(x * 2) + 1, rtol=1e-2, atol=1e-2)


def test_cpu_and_cuda_agree(make_base, make_residual):
    for form in ("codebook", "uniform"):
        base, residual = make_base(form, 1536, 576, 4, 64), make_residual(1536, 576, 4)
        x = torch.randn(3, 1536).half()
        on_cpu = getattr(torch.ops.decdec, f"{form}_gemv_compensated")(x, *base.args, None, *residual.args, 8)
        on_gpu = compensated(form)(x.to(DEVICE), *placed(base.args), None, *placed(residual.args), 8).cpu()
        assert torch.allclose(on_cpu, on_gpu, rtol=4e-3, atol=2e-3 * float(on_cpu.abs().max()))


@needs_gpu
def test_arena_rows_are_read_over_the_link_and_keep_their_memory(make_base, make_residual):
    from decdec import arena

    base, residual = make_base("codebook", 2048, 512, 3), make_residual(2048, 512, 4)
    x = torch.randn(1, 2048, device=DEVICE).half()
    pinned = arena.pin([residual.args[0], residual.args[0].flip(0)])
    assert all(rows.is_cuda and rows.dtype == torch.uint8 for rows in pinned)
    rows = pinned[0]
    del pinned
    scale = placed(residual.args[1])
    on_gpu = compensated("codebook")(x, *placed(base.args), None, *placed(residual.args), 16)
    assert torch.equal(compensated("codebook")(x, *placed(base.args), None, rows, scale, 4, False, 16), on_gpu)
    assert torch.equal(rows.cpu(), residual.args[0])
    assert not any(tensor.any() for tensor in arena.pinned_rows([(3, 16), (5, 4096)]))
