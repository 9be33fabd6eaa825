"""Residual quantization: from ``W - W_q`` to packed rows and their scales.

The paper's form (its section 4.2) has a scale per output channel and levels ``c * scale``. The nested form splits an interval
around zero into ``2**bits`` equal parts, levels ``(c + 1/2) * width / 2**bits``. On a uniform base the interval is the base grid's
own step, which bounds the residual, so that no scale is added. Codebooks have no step, and leave least where activations are
largest: the interval of best fit serves, one per output channel, of rows that are brought to one size first (``row_scale``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from decdec import ops, packing
from decdec.errors import UserError

PAPER_BITS = (2, 4, 8, 16)
NESTED_BITS = (1, 2, 3, 4)
_CANDIDATES = 32  # as many as the paper's search tries
_ROUNDS = 8


def row_scale_of(residuals: Sequence[Tensor]) -> Tensor:
    """Size of each row (input channel) of the residuals ``(d_out, d_in)`` of layers that share their input: root mean square
    over all their outputs, over its mean; float32 ``(d_in,)``."""
    size = torch.cat([residual.square().sum(0, keepdim=True) for residual in residuals]).sum(0).sqrt()
    return size / size.mean().clamp_min(torch.finfo(torch.float32).tiny)


def fit_interval(residual: Tensor, bits: int) -> Tensor:
    """Width of the interval whose split into ``2**bits`` parts leaves least squared error, float16 ``(1, d_out)``.

    ``residual`` is float32 ``(d_out, d_in)``. The best of evenly spaced widths up to the largest residual's, then rounds that take
    the best width for the codes at hand and the best codes for that width: within a hundredth of the least error.
    """
    largest = residual.abs().amax(1) / 2 ** (bits - 1)
    step, least = largest, torch.full_like(largest, torch.inf)
    for i in range(1, _CANDIDATES + 1):
        tried = largest * i / _CANDIDATES
        error = ((_split(residual, tried, bits) + 0.5) * tried[:, None] - residual).square_().mean(1)
        step, least = torch.where(error < least, tried, step), torch.minimum(error, least)
    for _ in range(_ROUNDS):
        level = _split(residual, step, bits) + 0.5
        step = (residual * level).sum(1) / level.square().sum(1)
    return (step * 2**bits).half()[None]


def quantize_nested(residual: Tensor, width: Tensor, bits: int) -> Tensor:
    """Codes int8 ``(d_out, d_in)``, 1 to 4 bits, that split intervals of ``width``, float16 ``(groups, d_out)``.

    A residual outside its interval takes the outermost part. Codes of fewer bits are the high bits of those of more.
    """
    if bits not in NESTED_BITS:
        raise UserError(f"bits: expected one of {NESTED_BITS} for a nested residual, got {bits}")
    grouped = residual.float().unflatten(1, (len(width), -1))
    return _split(grouped, width.float().t() / 2**bits, bits).to(torch.int8).flatten(1)


def _split(values: Tensor, step: Tensor, bits: int) -> Tensor:
    """Codes (float) of ``values``, ``(..., n)``, for a ``step`` ``(...)``; 0 where the step is 0."""
    half = 2 ** (bits - 1)
    step = step[..., None]
    return torch.where(step > 0, torch.floor(values / step), 0.0).clamp_(-half, half - 1)


def pack_layer(residual: Tensor, bits: int, nested: bool = False, base_scales: Tensor | None = None,
               row_scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """One layer's cheatsheet entry from its residual, float32 ``(d_out, d_in)``.

    ``row_scale``, float32 ``(d_in,)``, is what each row is divided by first.

    Returns the packed rows, uint8 ``(d_in, row_bytes)``, and their scales, float16 ``(groups, d_out)``: for the paper's form one
    group (:func:`decdec.ops.residual_quantize`, on the CPU alone); nested, ``base_scales`` of a uniform base or else the fitted
    intervals; None at 16 bits, where the residual itself is kept as float16.
    """
    if not bool(residual.isfinite().all()):
        raise UserError("residual: expected finite values; the original or the quantized weights hold NaN or Inf")
    if row_scale is not None:
        residual = residual / torch.where(row_scale > 0, row_scale, 1.0)
    if nested:
        width = fit_interval(residual, bits) if base_scales is None else base_scales
        return packing.pack_residual(quantize_nested(residual, width, bits).t(), bits), width
    if bits == 16:
        return packing.pack_residual(residual.t(), 16), None
    codes, scale = ops.residual_quantize(residual, bits)
    return packing.pack_residual(codes.t(), bits), scale[None]
