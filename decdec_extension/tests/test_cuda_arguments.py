"""The CUDA ops take any number of rows, and refuse views that their kernels could not read. Without a GPU: in the emulation."""

import pytest
import torch

from decdec import arena, decode_ops, ops
from decdec.errors import UserError

GPU = torch.cuda.is_available() and torch.ops.decdec.has_cuda()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = [] if GPU else [pytest.mark.usefixtures("emulation")]
D_IN, D_OUT = 192, 48


def placed(values):
    return tuple(value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in values)


def shifted(tensor, elements=1):
    """An equal tensor that begins so many elements beyond where an allocation does."""
    store = tensor.new_empty(tensor.numel() + elements)
    store[elements:] = tensor.flatten()
    return store[elements:].view(tensor.shape)


def refusal(op, *arguments, **named):
    with pytest.raises(RuntimeError) as caught:
        op(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", ("codebook", "uniform"))
def test_more_than_eight_rows_are_those_of_eight_at_a_time(make_base, make_residual, form):
    base, compensation = placed(make_base(form, D_IN, D_OUT, 3, 64).args), placed(make_residual(D_IN, D_OUT, 4).args)
    plain, fused = (getattr(ops, f"{form}_gemv{kind}") for kind in ("", "_compensated"))
    x, bias = torch.randn(21, D_IN).half().to(DEVICE), torch.randn(D_OUT).half().to(DEVICE)
    norm = torch.rand(D_IN).half().to(DEVICE) + 0.5
    for rows in (9, 16, 21):
        workspace = torch.zeros(8 * D_OUT * rows, dtype=torch.uint8, device=DEVICE)
        for op, more in ((plain, {"bias": bias}), (plain, {"norm": norm}),
                         (fused, dict(zip(("bias", "residual", "residual_scale", "residual_bits", "nested", "k_chunk"),
                                          (bias, *compensation, 16))) | {"workspace": workspace})):
            parts = torch.cat([op(part, *base, **more) for part in x[:rows].split(8)])
            assert torch.equal(op(x[:rows], *base, **more), parts) and parts.isfinite().all()
        assert not workspace.any()


def test_views_between_what_kernels_read_at_once_are_refused(make_base, make_residual):
    x, norm = torch.randn(1, D_IN).half().to(DEVICE), torch.ones(D_IN).half().to(DEVICE)
    residual, *rest = placed(make_residual(D_IN, D_OUT, 4).args)
    for form, gemv, dequantize in (("codebook", ops.codebook_gemv, ops.codebook_dequantize),
                                   ("uniform", ops.uniform_gemv, ops.uniform_dequantize)):
        base = placed(make_base(form, D_IN, D_OUT, 4, 64).args)
        assert torch.equal(gemv(shifted(x), *base), gemv(x, *base))  # read one by one
        for at, name in enumerate(("qweight", "codebook") if form == "codebook" else ("qweight", "scales", "zeros")):
            view = (*base[:at], shifted(base[at]), *base[at + 1:])
            wanted = 16 if name in ("qweight", "codebook") else 4
            message = f": {name}: expected memory that begins at a multiple of {wanted} bytes (a clone's does), got "
            for refused in (refusal(gemv, x, *view), refusal(dequantize, *view, D_IN, torch.float16)):
                assert message in refused and refused.endswith(f", {base[at].element_size()} bytes beyond one")
        assert ": norm: expected memory" in refusal(gemv, x, *base, norm=shifted(norm))
        assert ": x: expected memory" in refusal(gemv, shifted(x), *base, norm=norm)
        compensated = getattr(ops, f"{form}_gemv_compensated")
        assert ": residual: expected memory" in refusal(compensated, x, *base, None, shifted(residual), *rest, 8)
    assert ": residual: expected memory" in refusal(ops.residual_dequantize, shifted(residual), *rest, D_OUT, torch.float16)


def test_the_ops_of_a_decoding_step_refuse_them_too():
    x, weight = torch.randn(1, 64).half().to(DEVICE), torch.ones(64).half().to(DEVICE)
    assert "rms_norm: x: expected memory" in refusal(decode_ops.rms_norm, shifted(x), weight, 1e-5)
    assert "rms_norm: weight: expected memory" in refusal(decode_ops.rms_norm, x, shifted(weight), 1e-5)
    assert "silu_mul: x: expected memory" in refusal(decode_ops.silu_mul, shifted(x))
    head = torch.randn(40, 64).half().to(DEVICE)
    assert "head_gemv: weight: expected memory" in refusal(decode_ops.head_gemv, x, shifted(head))
    assert "argmax: x: expected memory" in refusal(decode_ops.argmax, shifted(x.float()))
    keys, position = torch.zeros(1, 8, 16).half().to(DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    attend = (torch.ones(1, 8, device=DEVICE), 1.0, 0, 0.25, 0)
    assert "attend: keys: expected memory" in refusal(decode_ops.attend, x, position, shifted(keys), keys, *attend)
    assert "attend: values: expected memory" in refusal(decode_ops.attend, x, position, keys, shifted(keys), *attend)
    assert "attend: qkv: expected memory" in refusal(decode_ops.attend, shifted(x), position, keys, keys, *attend)


def test_mistakes_are_named(make_base, make_residual):
    base, residual = make_base("codebook", 128, 40, 3), make_residual(128, 40, 4)
    args, rest = placed(base.args), placed(residual.args)
    x = torch.randn(1, 128, device=DEVICE).half()
    call = ops.codebook_gemv_compensated
    mistakes = [
        (lambda: call(x.float(), *args, None, *rest, 8), "x"),
        (
            lambda: call(x, *args, None, *rest, 8, workspace=torch.zeros(8, dtype=torch.uint8, device=DEVICE)),
            "workspace",
        ),
        (lambda: call(x, *args, None, *rest, 1025), "k_chunk"),
    ]
    if GPU:
        mistakes += [
            (lambda: call(x, base.args[0], *args[1:], None, *rest, 8), "qweight"),
            (lambda: call(x, *args, None, residual.args[0], *rest[1:], 8), "residual"),
        ]
    for mistake, name in mistakes:
        with pytest.raises(RuntimeError, match=f"codebook_gemv_compensated: {name}: expected .*, got "):
            mistake()


@pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")
def test_arena_says_when_memory_is_short():
    with pytest.raises(UserError, match="residuals: expected at most .* GB.*, got 9000.00 GB"):
        arena.pinned_rows([(9_000_000, 1_000_000)])
    with pytest.raises(UserError, match="could not be pinned"):
        arena.pinned_rows([(2**40, 2**20)], check_memory=False)
