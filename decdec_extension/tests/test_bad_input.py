"""Every check of the ops refuses with one line that names the op, the argument, what was expected and what came."""

import pytest
import torch

from decdec import ops

D_IN, D_OUT = 128, 40


@pytest.fixture
def codebook(make_base):
    base = make_base("codebook", D_IN, D_OUT, 3)
    return {"x": torch.randn(2, D_IN), **dict(zip(("qweight", "codebook", "scale"), base.args))}


@pytest.fixture
def uniform(make_base):
    base = make_base("uniform", D_IN, D_OUT, 4, 64)
    return {"x": torch.randn(2, D_IN), **dict(zip(("qweight", "scales", "zeros"), base.args))}


@pytest.fixture
def residual(make_residual):
    names = ("residual", "residual_scale", "residual_bits", "nested")
    return dict(zip(names, make_residual(D_IN, D_OUT, 4, groups=2).args))


def refusal(op, arguments):
    """The message of ``op`` called with bad ``arguments``: a single line of ours, without a C++ trace."""
    with pytest.raises(RuntimeError) as caught:
        op(**arguments)
    message = str(caught.value)
    assert message.startswith(f"{op.__name__}: ") and "\n" not in message, message
    return message.removeprefix(f"{op.__name__}: ")


@pytest.mark.parametrize("x, got", [
    (torch.randn(D_IN), "float32 (128) on cpu"),
    (torch.randn(2, D_IN).double(), "float64 (2, 128) on cpu"),
    (torch.ones(2, D_IN, dtype=torch.int32), "int32 (2, 128) on cpu"),
    (torch.empty(2, 0), "float32 (2, 0) on cpu"),
])
def test_x(codebook, uniform, residual, x, got):
    expected = f"x: expected contiguous float32, float16 or bfloat16 (batch, d_in) with d_in >= 1, got {got}"
    indices = torch.zeros((2, 1), dtype=torch.int32)
    calls = [(ops.codebook_gemv, codebook), (ops.uniform_gemv, uniform), (ops.select_channels, {"k_chunk": 8}),
             (ops.residual_gemv, residual | {"indices": indices, "d_out": D_OUT}),
             (ops.codebook_gemv_compensated, codebook | residual | {"bias": None, "k_chunk": 8}),
             (ops.uniform_gemv_compensated, uniform | residual | {"bias": None, "k_chunk": 8})]
    for op, arguments in calls:
        assert refusal(op, arguments | {"x": x}) == expected


@pytest.mark.parametrize("name, change, expected", [
    ("qweight", lambda q: q[:, :, :1], "int32 (row tiles, units, bits, 32) with 2, 3 or 4 bits, got non-contiguous int32"),
    ("qweight", lambda q: q.flatten(), "int32 (row tiles, units, bits, 32) with 2, 3 or 4 bits, got int32 (576)"),
    ("qweight", lambda q: q[:2], "contiguous int32 (3, 2, 3, 32) on cpu, got int32 (2, 2, 3, 32)"),
    ("qweight", lambda q: q.long(), "contiguous int32 (3, 2, 3, 32) on cpu, got int64"),
    ("codebook", lambda c: c[0], "int16 (d_out, 2**bits) with d_out >= 1, got int16 (8)"),
    ("codebook", lambda c: c[:, :4], "contiguous int16 (40, 8) on cpu, got non-contiguous int16 (40, 4)"),
    ("codebook", lambda c: c.float(), "contiguous int16 (40, 8) on cpu, got float32 (40, 8)"),
    ("scale", lambda s: s[:39], "contiguous float32 (40) on cpu, got float32 (39)"),
    ("scale", lambda s: s.half(), "contiguous float32 (40) on cpu, got float16 (40)"),
])
def test_codebook_weights(codebook, name, change, expected):
    bad = codebook | {name: change(codebook[name])}
    assert refusal(ops.codebook_gemv, bad).startswith(f"{name}: expected {expected}")
    del bad["x"]
    dense = bad | {"d_in": D_IN, "dtype": torch.float32}
    assert refusal(ops.codebook_dequantize, dense).startswith(f"{name}: expected {expected}")


@pytest.mark.parametrize("name, change, expected", [
    ("qweight", lambda q: q[:, :1].contiguous(), "contiguous int32 (3, 2, 4, 32) on cpu, got int32 (3, 1,"),
    ("scales", lambda s: s[0], "float16 (groups, d_out) whose groups divide d_in = 128, got float16 (40)"),
    ("scales", lambda s: s.repeat(2, 1)[:3], "float16 (groups, d_out) whose groups divide d_in = 128, got float16 (3,"),
    ("scales", lambda s: s.float(), "contiguous float16 (2, 40) on cpu, got float32 (2, 40)"),
    ("zeros", lambda z: z[:1], "contiguous float16 (2, 40) on cpu, got float16 (1, 40)"),
    ("zeros", lambda z: z.t().contiguous().t(), "contiguous float16 (2, 40) on cpu, got non-contiguous"),
])
def test_uniform_weights(uniform, name, change, expected):
    bad = uniform | {name: change(uniform[name])}
    assert refusal(ops.uniform_gemv, bad).startswith(f"{name}: expected {expected}")
    del bad["x"]
    dense = bad | {"d_in": D_IN, "dtype": torch.float32}
    assert refusal(ops.uniform_dequantize, dense).startswith(f"{name}: expected {expected}")


@pytest.mark.parametrize("bias, got", [
    (torch.randn(39), "float32 (39)"),
    (torch.randn(40).half(), "float16 (40)"),
    (torch.randn(1, 40), "float32 (1, 40)"),
])
def test_bias(codebook, uniform, residual, bias, got):
    expected = f"bias: expected contiguous float32 (40) on cpu, got {got} on cpu"
    assert refusal(ops.codebook_gemv, codebook | {"bias": bias}) == expected
    assert refusal(ops.uniform_gemv, uniform | {"bias": bias}) == expected
    assert refusal(ops.codebook_gemv_compensated, codebook | residual | {"bias": bias, "k_chunk": 8}) == expected


@pytest.mark.parametrize("change, expected", [
    ({"residual_bits": 5}, "residual_bits: expected 1, 2, 3, 4, 8 or 16, got 5"),
    ({"residual_bits": 8}, "residual: expected contiguous uint8 (128, 48) on cpu, got uint8 (128, 32)"),
    ({"residual": torch.zeros((64, 32), dtype=torch.uint8)}, "residual: expected contiguous uint8 (128, 32)"),
    ({"residual": torch.zeros((128, 32), dtype=torch.int8)}, "residual: expected contiguous uint8 (128, 32)"),
    ({"residual_scale": None}, "residual_scale: expected float16 (groups, d_out), got None"),
    ({"residual_scale": torch.ones(3, D_OUT).half()},
     "residual_scale: expected float16 (groups, d_out) whose groups divide d_in = 128, got float16 (3, 40)"),
    ({"residual_scale": torch.ones(D_OUT).half()}, "residual_scale: expected float16 (groups, d_out) whose"),
    ({"residual_scale": torch.ones(1, 39).half()}, "residual_scale: expected contiguous float16 (1, 40)"),
    ({"residual_scale": torch.ones(1, D_OUT)}, "residual_scale: expected contiguous float16 (1, 40)"),
    ({"row_scale": torch.ones(D_IN).half()}, "row_scale: expected contiguous float32 (128)"),
    ({"row_scale": torch.ones(D_IN + 1)}, "row_scale: expected contiguous float32 (128)"),
    ({"residual": torch.zeros((128, 80), dtype=torch.uint8), "residual_bits": 16},
     "residual_scale: expected None with 16-bit residuals, got float16 (2, 40) on cpu"),
])
def test_residual(codebook, uniform, residual, change, expected):
    bad = residual | change
    more = {"bias": None, "k_chunk": 8}
    given = {"x": codebook["x"], "indices": torch.zeros((2, 1), dtype=torch.int32), "d_out": D_OUT}
    assert refusal(ops.codebook_gemv_compensated, codebook | bad | more).startswith(expected)
    assert refusal(ops.uniform_gemv_compensated, uniform | bad | more).startswith(expected)
    assert refusal(ops.residual_gemv, bad | given).startswith(expected)


def test_residual_dequantize(residual):
    given = residual | {"d_out": D_OUT, "dtype": torch.float32}
    wide = refusal(ops.residual_dequantize, given | {"d_out": 65})
    assert wide == "residual: expected contiguous uint8 (128, 48) on cpu, got uint8 (128, 32) on cpu"
    assert refusal(ops.residual_dequantize, given | {"d_out": 0}) == "d_out: expected at least 1, got 0"
    assert refusal(ops.residual_dequantize, given | {"residual": given["residual"][0]}).startswith(
        "residual: expected uint8 (d_in, row bytes), got uint8 (32)")


@pytest.mark.parametrize("change, expected", [
    ({"residual_bits": 3}, "residual_bits: expected 2, 4 or 8, got 3"),
    ({"residual": torch.randn(D_IN)}, "residual: expected float32 (d_out, d_in) with d_in below 131072, got float32 (128)"),
    ({"residual": torch.zeros(1, 131072)}, "residual: expected float32 (d_out, d_in) with d_in below 131072"),
    ({"residual": torch.zeros(2, 3).half()}, "residual: expected contiguous float32 (2, 3) on cpu, got float16 (2, 3)"),
    ({"residual": torch.tensor([[1.0], [torch.inf]])}, "residual: expected finite values, got NaN or Inf in row 1"),
    ({"residual": torch.tensor([[torch.nan], [1.0]])}, "residual: expected finite values, got NaN or Inf in row 0"),
])
def test_residual_quantize(change, expected):
    given = {"residual": torch.randn(D_OUT, D_IN), "residual_bits": 4} | change
    assert refusal(ops.residual_quantize, given).startswith(expected)


@pytest.mark.parametrize("change, expected", [
    ({"k_chunk": -1}, "k_chunk: expected 0 to 1024, got -1"),
    ({"k_chunk": 1025}, "k_chunk: expected 0 to 1024, got 1025"),
    ({"b_0": 2.0}, "b_15: expected both boundaries or neither, got None"),
    ({"b_15": 2.0}, "b_0: expected both boundaries or neither, got None"),
    ({"b_0": 1.0, "b_15": 2.0}, "b_0: expected finite b_0 >= b_15 >= 0, got b_0 = 1, b_15 = 2"),
    ({"b_0": 1.0, "b_15": -2.0}, "b_0: expected finite b_0 >= b_15 >= 0, got b_0 = 1, b_15 = -2"),
    ({"b_0": float("nan"), "b_15": 2.0}, "b_0: expected finite b_0 >= b_15 >= 0, got b_0 = nan, b_15 = 2"),
    ({"b_0": float("inf"), "b_15": 2.0}, "b_0: expected finite b_0 >= b_15 >= 0, got b_0 = inf, b_15 = 2"),
    ({"center": torch.zeros(D_IN).half()}, "center: expected contiguous float32 (128)"),
    ({"center": torch.zeros(D_IN - 1)}, "center: expected contiguous float32 (128)"),
])
def test_selection(codebook, uniform, residual, change, expected):
    given = {"k_chunk": 8} | change
    assert refusal(ops.select_channels, {"x": codebook["x"]} | given).startswith(expected)
    assert refusal(ops.codebook_gemv_compensated, codebook | residual | {"bias": None} | given).startswith(expected)
    assert refusal(ops.uniform_gemv_compensated, uniform | residual | {"bias": None} | given).startswith(expected)


def test_n_tb(codebook, residual):
    bad = codebook | residual | {"bias": None, "k_chunk": 8, "n_tb": 0}
    assert refusal(ops.codebook_gemv_compensated, bad) == "n_tb: expected at least 1, got 0"


@pytest.mark.parametrize("indices, expected", [
    (torch.zeros((2, 1)), "indices: expected contiguous int32 (2, 1) on cpu, got float32 (2, 1)"),
    (torch.zeros((1, 4), dtype=torch.int32), "indices: expected contiguous int32 (2, 4)"),
    (torch.zeros(2, dtype=torch.int32), "indices: expected contiguous int32 (2, 0)"),
    (torch.tensor([[0], [128]], dtype=torch.int32), "indices: expected values below d_in = 128, got 128"),
])
def test_indices(residual, indices, expected):
    given = residual | {"x": torch.randn(2, D_IN), "d_out": D_OUT, "indices": indices}
    assert refusal(ops.residual_gemv, given).startswith(expected)


def test_dtype_and_width_of_a_dense_matrix(codebook, uniform):
    del codebook["x"], uniform["x"]
    wide = {"d_in": D_IN, "dtype": torch.float64}
    expected = "dtype: expected float32, float16 or bfloat16, got float64"
    assert refusal(ops.codebook_dequantize, codebook | wide) == expected
    assert refusal(ops.uniform_dequantize, uniform | wide) == expected
    none = {"d_in": 0, "dtype": torch.float32}
    assert refusal(ops.codebook_dequantize, codebook | none) == "d_in: expected at least 1, got 0"
    assert refusal(ops.uniform_dequantize, uniform | none) == "d_in: expected at least 1, got 0"
