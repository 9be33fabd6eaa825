"""The ops of DecDEC: typed wrappers of ``torch.ops.decdec.*`` and their fakes (shapes without data, for torch.compile).

One schema serves the CPU and the CUDA implementation; :mod:`decdec.reference` is the specification of both. Conventions:

* ``x`` is ``(batch, d_in)``; float16, bfloat16 or (CPU only) float32. Outputs are ``(batch, d_out)`` in its dtype;
  sums are accumulated in float32. Every batch row selects its own channels. CUDA reads the weights once for every 8 rows.
  ``bias`` has the dtype of ``x``. The wrappers make ``x`` contiguous; every other tensor must be.
* Base weights are in the tile layout of :mod:`decdec.packing`; their bits (2, 3 or 4) are ``qweight.shape[2]``.
  Codebook weights: ``W[o, i] = scale[o] * codebook[o, code]``, ``codebook`` int16 ``(d_out, 2**bits)``, ``scale`` float32
  ``(d_out,)``. Uniform weights: ``W[o, i] = scales[g, o] * (code - zeros[g, o])`` with ``g = i // group_size``; ``scales`` and
  ``zeros`` are float16 ``(d_in / group_size, d_out)``.
* Residuals are in the row layout of :mod:`decdec.packing`, uint8 ``(d_in, row_bytes)``; on a GPU a CUDA-typed view of pinned
  host memory, or GPU memory. ``residual_scale`` is float16 ``(groups, d_out)``: one group is the paper's scale per output
  channel (section 4.2). ``nested``: the residual is ``(c + 1/2) * residual_scale / 2**bits``, inside the interval of the base
  grid whose step the scale is. At 16 bits the scale is None.
* ``k_chunk`` channels are selected in each 1024-wide chunk (section 4.3), in a last, narrower one its proportional share
  rounded up. ``b_0`` and ``b_15`` are the paper's two bucket boundaries; without them the selection is exact. Ties, and the
  bucket that overflows, are cut at the lowest index. NaN and Inf are never selected.
* ``norm`` (``(d_in,)``, dtype of ``x``), on a GPU alone: ``x`` first passes an RMSNorm with this weight and ``norm_eps``, as if by
  :func:`decdec.decode_ops.rms_norm`. ``d_in`` is a multiple of 8 then, uniform weights have groups of a multiple of 32 and
  even ``d_out``.
* ``center`` (float32 ``(d_in,)``) is subtracted from ``x`` before selection and residual product.
* ``row_scale`` (float32 ``(d_in,)``) is what the residual's rows, as they are stored, are multiplied with; selection does not see it.

Wrong shapes, dtypes, devices or values raise RuntimeError naming the argument, what was expected and what came.
"""

import torch
from torch import Tensor

from decdec import _library
from decdec.reference import chunk_counts

_library.load()
_ops = torch.ops.decdec


def codebook_dequantize(qweight: Tensor, codebook: Tensor, scale: Tensor, d_in: int, dtype: torch.dtype) -> Tensor:
    """The ``(d_out, d_in)`` matrix of codebook weights, in ``dtype``."""
    return _ops.codebook_dequantize(qweight, codebook, scale, d_in, dtype)


def uniform_dequantize(qweight: Tensor, scales: Tensor, zeros: Tensor, d_in: int, dtype: torch.dtype) -> Tensor:
    """The ``(d_out, d_in)`` matrix of group-wise uniform weights, in ``dtype``."""
    return _ops.uniform_dequantize(qweight, scales, zeros, d_in, dtype)


def residual_dequantize(residual: Tensor, residual_scale: Tensor | None, residual_bits: int, nested: bool, d_out: int,
                        dtype: torch.dtype) -> Tensor:
    """The residual, transposed as it is stored: ``(d_in, d_out)``, in ``dtype``."""
    return _ops.residual_dequantize(residual, residual_scale, residual_bits, nested, d_out, dtype)


def residual_quantize(residual: Tensor, residual_bits: int) -> tuple[Tensor, Tensor]:
    """The paper's residual quantization (section 4.2) of ``W - W_q``, float32 ``(d_out, d_in)``, to 2, 4 or 8 bits.

    Returns codes int8 ``(d_out, d_in)`` and a scale for each output channel, float16 ``(d_out,)``: of the candidates
    ``linspace(max / 32, max, 32)``, with ``max`` the channel's largest ``|residual|`` over ``2**(residual_bits-1) - 1`` levels,
    the one of least squared error, the smallest of equals. Runs on the CPU alone; deterministic.
    """
    return _ops.residual_quantize(residual.contiguous(), residual_bits)


def codebook_gemv(x: Tensor, qweight: Tensor, codebook: Tensor, scale: Tensor, bias: Tensor | None = None,
                  norm: Tensor | None = None, norm_eps: float = 0.0) -> Tensor:
    """Base GEMV of codebook weights: ``W_q x + bias``."""
    return _ops.codebook_gemv(x.contiguous(), qweight, codebook, scale, bias, norm, norm_eps)


def uniform_gemv(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None,
                 norm: Tensor | None = None, norm_eps: float = 0.0) -> Tensor:
    """Base GEMV of group-wise uniform weights: ``W_q x + bias``."""
    return _ops.uniform_gemv(x.contiguous(), qweight, scales, zeros, bias, norm, norm_eps)


def select_channels(x: Tensor, k_chunk: int, b_0: float | None = None, b_15: float | None = None,
                    center: Tensor | None = None) -> Tensor:
    """Salient channels of every row, int32 ``(batch, sum of the chunks' counts)``.

    Ascending within each chunk's segment; -1 fills a segment whose chunk has fewer finite values than its count.
    """
    return _ops.select_channels(x.contiguous(), k_chunk, b_0, b_15, center)


def residual_gemv(x: Tensor, indices: Tensor, residual: Tensor, residual_scale: Tensor | None, residual_bits: int,
                  nested: bool, d_out: int, center: Tensor | None = None, row_scale: Tensor | None = None) -> Tensor:
    """``sum over selected i of row_scale[i] * R[i, :] * (x[i] - center[i])`` for given ``indices`` int32 ``(batch, k)``;
    negative ones are skipped."""
    return _ops.residual_gemv(x.contiguous(), indices, residual, residual_scale, residual_bits, nested, d_out, center, row_scale)


def codebook_gemv_compensated(x: Tensor, qweight: Tensor, codebook: Tensor, scale: Tensor, bias: Tensor | None,
                              residual: Tensor, residual_scale: Tensor | None, residual_bits: int, nested: bool,
                              k_chunk: int, b_0: float | None = None, b_15: float | None = None,
                              center: Tensor | None = None, n_tb: int = 8, workspace: Tensor | None = None,
                              norm: Tensor | None = None, norm_eps: float = 0.0,
                              row_scale: Tensor | None = None) -> Tensor:
    """Compensated GEMV of codebook weights, ``(W_q + R ⊙ M(x)) x + bias``: selection, fetch, residual GEMV and merge at once.

    ``n_tb`` thread blocks fetch while the others run the base GEMV (section 4.3); the CPU ignores it. ``workspace``
    (:func:`workspace_bytes`) is all zero between calls; calls that may overlap need one each. Deterministic.
    """
    return _ops.codebook_gemv_compensated(x.contiguous(), qweight, codebook, scale, bias, residual, residual_scale,
                                          residual_bits, nested, k_chunk, b_0, b_15, center, n_tb, workspace,
                                          norm, norm_eps, row_scale)


def uniform_gemv_compensated(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None,
                             residual: Tensor, residual_scale: Tensor | None, residual_bits: int, nested: bool,
                             k_chunk: int, b_0: float | None = None, b_15: float | None = None,
                             center: Tensor | None = None, n_tb: int = 8, workspace: Tensor | None = None,
                             norm: Tensor | None = None, norm_eps: float = 0.0,
                             row_scale: Tensor | None = None) -> Tensor:
    """Compensated GEMV of group-wise uniform weights; see :func:`codebook_gemv_compensated`."""
    return _ops.uniform_gemv_compensated(x.contiguous(), qweight, scales, zeros, bias, residual, residual_scale,
                                         residual_bits, nested, k_chunk, b_0, b_15, center, n_tb, workspace,
                                         norm, norm_eps, row_scale)


def _fake(name):
    return torch.library.register_fake(f"decdec::{name}")


@_fake("codebook_dequantize")
def _(qweight, codebook, scale, d_in, dtype):
    return codebook.new_empty((codebook.shape[0], d_in), dtype=dtype)


@_fake("uniform_dequantize")
def _(qweight, scales, zeros, d_in, dtype):
    return scales.new_empty((scales.shape[1], d_in), dtype=dtype)


@_fake("residual_dequantize")
def _(residual, residual_scale, residual_bits, nested, d_out, dtype):
    return residual.new_empty((residual.shape[0], d_out), dtype=dtype)


@_fake("residual_quantize")
def _(residual, residual_bits):
    return residual.new_empty(residual.shape, dtype=torch.int8), residual.new_empty(residual.shape[0], dtype=torch.float16)


@_fake("codebook_gemv")
def _(x, qweight, codebook, scale, bias=None, norm=None, norm_eps=0.0):
    return x.new_empty((x.shape[0], codebook.shape[0]))


@_fake("uniform_gemv")
def _(x, qweight, scales, zeros, bias=None, norm=None, norm_eps=0.0):
    return x.new_empty((x.shape[0], scales.shape[1]))


@_fake("select_channels")
def _(x, k_chunk, b_0=None, b_15=None, center=None):
    return x.new_empty((x.shape[0], sum(chunk_counts(x.shape[1], k_chunk))), dtype=torch.int32)


@_fake("residual_gemv")
def _(x, indices, residual, residual_scale, residual_bits, nested, d_out, center=None, row_scale=None):
    return x.new_empty((x.shape[0], d_out))


@_fake("codebook_gemv_compensated")
def _(x, qweight, codebook, scale, bias, residual, residual_scale, residual_bits, nested, k_chunk, b_0=None, b_15=None,
      center=None, n_tb=8, workspace=None, norm=None, norm_eps=0.0, row_scale=None):
    return x.new_empty((x.shape[0], codebook.shape[0]))


@_fake("uniform_gemv_compensated")
def _(x, qweight, scales, zeros, bias, residual, residual_scale, residual_bits, nested, k_chunk, b_0=None, b_15=None,
      center=None, n_tb=8, workspace=None, norm=None, norm_eps=0.0, row_scale=None):
    return x.new_empty((x.shape[0], scales.shape[1]))
