"""The ops of a decoding step against Hugging Face's modules and plain attention, on the CPU and on a GPU; without one the
CUDA ops run in the emulation (emulated/emulator.h)."""

import pytest
import torch
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from decdec import decode_ops as ops
from decdec import ops as gemv
from decdec import reference
from decdec.testing import poison_shared_memory

GPU = torch.cuda.is_available() and torch.ops.decdec.has_cuda()
gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
CUDA = "cuda" if GPU else "emulated"
DEVICES = [("cpu", torch.float32), (CUDA, torch.float16), (CUDA, torch.bfloat16)]
# heads, kv_heads, head_dim, rotary, window, q/k norms, live lengths
SHAPES = [(4, 4, 64, 64, 0, False, (1, 2, 64, 65, 300)),
          (8, 2, 128, 128, 0, False, (1, 63, 64, 65, 128, 129, 200, 255, 1999)),
          (14, 2, 128, 128, 0, True, (5, 700)), (9, 3, 64, 64, 100, False, (99, 100, 101, 500)),
          (4, 4, 96, 48, 0, False, (7, 130)), (2, 1, 16, 16, 3, True, (2, 9)), (8, 1, 256, 256, 0, False, (3, 1000)),
          (24, 2, 80, 40, 0, False, (333,)), (8, 8, 32, 32, 0, False, (111, 118, 130))]


@pytest.fixture
def device(request):
    """Where a test's tensors are: those of the emulation are on the CPU."""
    if request.param == "emulated":
        request.getfixturevalue("emulation")(sms=132)  # so many that attention is split among blocks
        return "cpu"
    return request.param


on_each = pytest.mark.parametrize("device, dtype", DEVICES, indirect=["device"])
on_cuda = pytest.mark.parametrize("device", [CUDA], indirect=True)


def tolerance(dtype):
    return dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=1e-2)


def attention(qkv, at, keys, values, frequencies, rotary_scaling, scaling, window, norms):
    """The same in float64, with Hugging Face's rotary and torch's attention; returns the output and the new key."""
    kv_heads, _, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    q, k, v = qkv.double().view(-1, dim).split((heads, kv_heads, kv_heads))
    if norms[0] is not None:
        q, k = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * n.double() for x, n in zip((q, k), norms))
    angles = torch.cat((at * frequencies, at * frequencies)).double()
    cos, sin = angles.cos() * rotary_scaling, angles.sin() * rotary_scaling
    rotary = len(angles)
    turned = apply_rotary_pos_emb(q[None, :, None, :rotary], k[None, :, None, :rotary], cos[None, None],
                                  sin[None, None])
    q, k = (torch.cat((t[0, :, 0], x[:, rotary:]), -1) for t, x in zip(turned, (q, k)))
    all_keys = torch.cat((keys[:, :at].double(), k[:, None]), 1)
    all_values = torch.cat((values[:, :at].double(), v[:, None]), 1)
    begin = max(0, at + 1 - window) if window else 0
    out = torch.nn.functional.scaled_dot_product_attention(
        q[None, :, None], all_keys[None, :, begin:], all_values[None, :, begin:], scale=scaling, enable_gqa=True)
    return out.reshape(1, -1), k


@on_each
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attend(shape, device, dtype):
    heads, kv_heads, dim, rotary, window, normed, lengths = shape
    frequencies = torch.rand(2, rotary // 2, device=device) * torch.tensor([[1.0], [0.1]], device=device)
    norms = [torch.rand(dim, device=device).to(dtype) + 0.5 if normed else None for _ in range(2)]
    workspace = torch.zeros(4 * heads, dtype=torch.uint8, device=device)
    for live in lengths:
        qkv = torch.randn(1, (heads + 2 * kv_heads) * dim, device=device).to(dtype)
        keys, values = (torch.randn(kv_heads, 2048, dim, device=device).to(dtype) for _ in range(2))
        keys[:, live - 1:], values[:, live - 1:] = torch.nan, torch.nan  # what lies beyond must not be read
        at = torch.tensor([live - 1], device=device)
        row = frequencies[int(live - 1 >= 64)]
        want, key = attention(qkv, live - 1, keys, values, row, 1.1, 0.2, window, norms)
        before = keys.clone(), values.clone()
        bound = max(live, 200) if live % 2 else 0  # one way or the other
        if device == "cuda":
            poison_shared_memory(dtype)
        got = ops.attend(qkv, at, keys, values, frequencies, 1.1, 64, 0.2, window, *norms, 1e-6, bound, workspace)
        assert_close(got.double(), want, **tolerance(dtype))
        assert_close(keys[:, live - 1].double(), key, **tolerance(dtype))
        assert torch.equal(values[:, live - 1], qkv.view(-1, dim)[heads + kv_heads:])
        keys[:, live - 1], values[:, live - 1] = before[0][:, live - 1], before[1][:, live - 1]
        assert all(torch.equal(now, then.nan_to_num()) for now, then in
                   zip((keys.nan_to_num(), values.nan_to_num()), before))  # nothing else was written
        assert not workspace.any()


@on_each
@pytest.mark.parametrize("rows, width", [(1, 4096), (3, 576), (1, 8), (2, 10000), (1, 32768)])
def test_norm_and_gate(rows, width, device, dtype):
    norm = LlamaRMSNorm(width, eps=1e-5).to(device, dtype)
    torch.nn.init.normal_(norm.weight, 1, 0.2)
    x = torch.randn(rows, width, device=device).to(dtype) * 3
    assert_close(ops.rms_norm(x, norm.weight.detach(), 1e-5), norm(x).detach(), **tolerance(dtype))
    gate_up = torch.randn(rows, 2 * width, device=device).to(dtype) * 3
    gate, up = gate_up.double().chunk(2, -1)
    assert_close(ops.silu_mul(gate_up).double(), gate * torch.sigmoid(gate) * up, **tolerance(dtype))


@on_each
@pytest.mark.parametrize("vocabulary, width", [(1, 16), (1000, 576), (777, 4096), (50000, 64)])
def test_head(vocabulary, width, device, dtype):
    x, weight = torch.randn(1, width, device=device).to(dtype), torch.randn(vocabulary, width, device=device).to(dtype)
    assert_close(ops.head_gemv(x, weight).double(), x.double() @ weight.double().t(), rtol=1e-3, atol=1e-3)
    small = torch.randint(-128, 128, (vocabulary, width), device=device, dtype=torch.int8)
    scale = torch.rand(vocabulary, device=device)
    assert_close(ops.head_gemv(x, small, scale).double(), x.double() @ small.double().t() * scale, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
def test_argmax_takes_the_lowest_of_equals_and_nan_above_all(device):
    workspace = torch.zeros(16, dtype=torch.uint8, device=device)
    for width in (1, 5, 1000, 128256):
        x = torch.randn(1, width, device=device) - 5
        assert ops.argmax(x, workspace).tolist() == [int(x.argmax())]
        x[0, width // 2:] = x.max() + 1
        assert ops.argmax(x, workspace).tolist() == [width // 2]
        x[0, width - 1] = torch.nan
        assert ops.argmax(x, workspace).tolist() == [width - 1]
        assert not workspace.any()
    assert ops.argmax(torch.tensor([[-1.0, -0.0, 0.0]], device=device)).tolist() == [1]


@pytest.mark.parametrize("device, dtype", [each for each in DEVICES if each[0] != "emulated"], indirect=["device"])
def test_schemas_and_fakes_hold(device, dtype):
    x = torch.randn(2, 64, device=device).to(dtype)
    keys = torch.zeros(2, 16, 16, device=device, dtype=dtype)
    position = torch.tensor([3], device=device)
    for op, arguments in ((ops._ops.rms_norm, (x, x[0].clone(), 1e-6)), (ops._ops.silu_mul, (x,)),
                          (ops._ops.head_gemv, (x[:1], x)), (ops._ops.argmax, (x[:1].float(),)),
                          (ops._ops.attend, (x.view(1, 128), position, keys, keys.clone(),
                                             torch.rand(1, 8, device=device), 1.0, 0, 0.25, 0))):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


@gpu
def test_attend_follows_its_position_in_a_captured_graph():
    qkv = torch.randn(1, 8 * 64, device="cuda").half()
    caches = [torch.randn(2, 512, 64, device="cuda").half() for _ in range(2)]
    frequencies, position = torch.rand(1, 32, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    workspace = torch.zeros(64, dtype=torch.uint8, device="cuda")
    rest = (frequencies, 1.0, 0, 0.125, 0, None, None, 1e-6, 0, workspace)
    ops.attend(qkv, position, *(cache.clone() for cache in caches), *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attend(qkv, position, *caches, *rest)
    for at in (0, 70, 500, 33):
        position.fill_(at)
        copies = [cache.clone().float() for cache in caches]
        graph.replay()
        want = reference.attend(qkv.float(), position, *copies, *rest)
        assert_close(out.float(), want, rtol=1e-2, atol=1e-2)


@on_cuda
@pytest.mark.parametrize("call, match", [
    (lambda x: ops.rms_norm(x.float(), x[0].float(), 1e-6), "rms_norm: x: expected contiguous float16 or bfloat16"),
    (lambda x: ops.rms_norm(x, x[0, :8].clone(), 1e-6), "rms_norm: weight"),
    (lambda x: ops.silu_mul(x[:, :8].contiguous()), "silu_mul: x"),
    (lambda x: ops.head_gemv(x, x), "head_gemv: x: expected one row"),
    (lambda x: ops.head_gemv(x[:1], x, x[0].float()), "head_gemv: weight"),
])
def test_wrong_arguments_are_named(call, match, device):
    with pytest.raises(RuntimeError, match=match):
        call(torch.randn(2, 64, device=device).half())


@on_cuda
@pytest.mark.parametrize("form", ["codebook", "uniform"])
@pytest.mark.parametrize("d_in, batch, dtype", [(576, 1, torch.float16), (4096, 1, torch.bfloat16),
                                                (4096, 3, torch.float16),
                                                (14336, 1, torch.float16), (14336, 8, torch.bfloat16),
                                                (1056, 2, torch.float16)])
def test_a_gemv_norms_its_input_itself(make_base, make_residual, form, d_in, batch, dtype, device):
    base, residual = make_base(form, d_in, 64, 3, 32), make_residual(d_in, 64, 4)
    weights, packed = ([part.to(device) if isinstance(part, torch.Tensor) else part for part in made.args]
                       for made in (base, residual))
    plain = gemv.codebook_gemv if form == "codebook" else gemv.uniform_gemv
    compensated = gemv.codebook_gemv_compensated if form == "codebook" else gemv.uniform_gemv_compensated
    x, norm = torch.randn(batch, d_in, device=device).to(dtype) * 3, torch.rand(d_in, device=device).to(dtype) + 0.5
    normed = ops.rms_norm(x, norm, 1e-5)
    rounding = torch.finfo(dtype).eps * 4
    want = plain(normed, *weights)
    assert_close(plain(x, *weights, norm=norm, norm_eps=1e-5), want, rtol=rounding, atol=rounding * float(want.std()))
    # Every channel, so that no near tie decides.
    want = compensated(normed, *weights, None, *packed, 1024)
    got = compensated(x, *weights, None, *packed, 1024, norm=norm, norm_eps=1e-5)
    assert_close(got, want, rtol=rounding, atol=rounding * float(want.std()))
    few = compensated(x, *weights, None, *packed, 16, norm=norm, norm_eps=1e-5)
    want = compensated(normed, *weights, None, *packed, 16)
    assert (few - want).abs().mean() < 0.02 * want.std()
    x[0, 3] = torch.nan
    out = plain(x, *weights, norm=norm, norm_eps=1e-5)
    assert out[0].isnan().all() and out[1:].isfinite().all()


def test_a_cpu_gemv_leaves_the_norm_to_its_op(make_base):
    base = make_base("codebook", 64, 16, 3)
    with pytest.raises(RuntimeError, match="norm: expected None on the CPU"):
        gemv.codebook_gemv(torch.randn(1, 64), *base.args, norm=torch.ones(64), norm_eps=1e-6)
