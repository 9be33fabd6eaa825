"""Which layers norm their input themselves: those whose fetching blocks have room for it on GPUs of 99 KB, in the emulation."""

from types import SimpleNamespace

import pytest
import torch

from decdec import decode_ops, ops
from decdec.linear import Compensation, CompensatedLinear


@pytest.mark.parametrize("d_in, k_chunk, fits", ((8192, 1024, True), (16384, 80, True), (16384, 128, False)))
def test_layers_norm_their_input_where_it_fits(emulation, make_base, make_residual, d_in, k_chunk, fits):
    emulation(sms=4, shared_per_sm=100 << 10, shared_per_block=99 << 10, major=8)
    base, residual = make_base("codebook", d_in, 16, 3), make_residual(d_in, 16, 4)
    layer = SimpleNamespace(in_features=d_in, compensation=Compensation(k_chunk, "exact"), format="codebook", repair=None,
                            order=None, qweight=SimpleNamespace(is_cuda=True))
    assert CompensatedLinear._norms(layer) == fits
    x, norm = torch.randn(1, d_in).half(), torch.rand(d_in).half() + 1
    arguments = *base.args, None, *residual.args, k_chunk
    if not fits:
        with pytest.raises(RuntimeError, match="selected channels of 16384 inputs need .* bytes of shared memory"):
            ops.codebook_gemv_compensated(x, *arguments, norm=norm, norm_eps=1e-5)
        return
    normed = decode_ops.rms_norm(x, norm, 1e-5)
    want = ops.codebook_gemv_compensated(normed, *arguments)
    assert torch.equal(ops.codebook_gemv_compensated(x, *arguments, norm=norm, norm_eps=1e-5), want)
