"""Every op is a well-behaved PyTorch op: schema, fake and dispatch agree, and torch.compile traces it whole."""

import pytest
import torch
from torch.library import opcheck

from decdec import ops

D_IN, D_OUT = 1100, 40
OPS = torch.ops.decdec


@pytest.fixture(params=("codebook", "uniform"))
def base(request, make_base):
    return make_base(request.param, D_IN, D_OUT, 3, 100)


@pytest.fixture
def residual(make_residual):
    return make_residual(D_IN, D_OUT, 4)


def of_form(base, name):
    """The op ``name`` of the base's form."""
    return getattr(OPS, f"{base.form}_{name}").default


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_base_ops(base, dtype):
    x, bias = torch.randn(2, D_IN).to(dtype), torch.randn(D_OUT).to(dtype)
    opcheck(of_form(base, "dequantize"), (*base.args, D_IN, dtype))
    opcheck(of_form(base, "gemv"), (x, *base.args, bias))
    opcheck(of_form(base, "gemv"), (x, *base.args))


def test_selection():
    x = torch.randn(2, D_IN)
    opcheck(OPS.select_channels.default, (x, 8))
    opcheck(OPS.select_channels.default, (x, 8, 3.0, 2.0, torch.randn(D_IN)))


@pytest.mark.parametrize("bits", (4, 16))
def test_residual_ops(make_residual, bits):
    residual = make_residual(D_IN, D_OUT, bits)
    indices = torch.tensor([[3, 700, -1]], dtype=torch.int32)
    opcheck(OPS.residual_dequantize.default, (*residual.args, D_OUT, torch.float16))
    x, center, row_scale = torch.randn(1, D_IN), torch.randn(D_IN), torch.rand(D_IN)
    opcheck(OPS.residual_gemv.default, (x, indices, *residual.args, D_OUT))
    opcheck(OPS.residual_gemv.default, (x, indices, *residual.args, D_OUT, center, row_scale))


@pytest.mark.parametrize("bits", (2, 8))
def test_residual_quantize(bits):
    opcheck(OPS.residual_quantize.default, (torch.randn(D_OUT, D_IN), bits))


def test_compensated_ops(base, residual):
    x, bias, center = torch.randn(2, D_IN), torch.randn(D_OUT), torch.randn(D_IN)
    opcheck(of_form(base, "gemv_compensated"), (x, *base.args, bias, *residual.args, 8))
    opcheck(of_form(base, "gemv_compensated"), (x, *base.args, None, *residual.args, 8, 3.0, 2.0, center, 4, None),
            {"row_scale": torch.rand(D_IN)})


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile_keeps_a_compensated_layer_whole(make_base, residual, backend):
    base = make_base("codebook", D_IN, D_OUT, 3)

    def layer(x):
        return torch.relu(ops.codebook_gemv_compensated(x * 2, *base.args, None, *residual.args, 8)) + 1

    x = torch.randn(1, D_IN)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x))


def test_compiled_selection_and_residual_product_meet(residual):
    def compensation(x):
        return ops.residual_gemv(x, ops.select_channels(x, 8, 3.0, 2.0), *residual.args, D_OUT)

    x = torch.randn(2, D_IN)
    assert torch.equal(torch.compile(compensation, fullgraph=True, backend="aot_eager")(x), compensation(x))
