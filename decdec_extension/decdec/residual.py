"""Residual quantization (section 4.2 of the paper): from ``W - W_q`` to packed rows and their scales."""

import torch
from torch import Tensor

from decdec import packing
from decdec.errors import UserError

GRID = 32  # candidates for a channel's scale: GRID even steps up to the scale that clips nothing
_VALUES_AT_ONCE = 1 << 21  # a chunk of outputs is worked on while it lies in the cache


def quantize_residual(residual: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric uniform codes of ``residual`` ``(d_out, d_in)`` for 2, 4 or 8 bits.

    Each output channel takes, of the scales ``linspace(max / 32, max, 32)`` with ``max`` its largest ``|residual|`` over
    ``2**(bits-1) - 1`` levels, the one with the least mean squared error (the smallest of equals). Returns codes int8
    ``(d_out, d_in)`` and scales float16 ``(d_out,)``. Deterministic.

    All candidates' rounding borders are whole multiples of ``max / 64``. So one histogram of ``|residual|`` in that unit, of
    counts and of sums, gives every candidate's error exactly, and the row is read once instead of 32 times.
    """
    if bits not in (2, 4, 8):
        raise UserError(f"bits: expected 2, 4 or 8 for a residual with a scale per channel, got {bits}")
    rows = max(1, _VALUES_AT_ONCE // residual.shape[1])
    codes = torch.empty(residual.shape, dtype=torch.int8, device=residual.device)
    scales = torch.empty(residual.shape[0], dtype=torch.float16, device=residual.device)
    for start in range(0, residual.shape[0], rows):
        part = slice(start, start + rows)
        codes[part], scales[part] = _quantize_rows(residual[part].float(), 2 ** (bits - 1) - 1)
    return codes, scales


def _quantize_rows(residual: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    magnitude = residual.abs()
    largest = magnitude.amax(1) / levels
    if not bool(largest.isfinite().all()):
        raise UserError("residual: expected finite values; the original or the quantized weights hold NaN or Inf")
    steps = torch.arange(GRID, device=residual.device)
    lowest = largest[:, None] / GRID
    stride = (largest[:, None] - lowest) / (GRID - 1)
    # From both ends towards the middle, which is how torch.linspace rounds.
    candidates = torch.where(steps < GRID // 2, lowest + stride * steps, largest[:, None] - stride * (GRID - 1 - steps))

    count, total = _histogram(magnitude, torch.where(largest > 0, 2 * GRID / largest, 0.0), 2 * GRID * levels + 1)
    # A value is rounded to level j or above, with step i, where it reaches (2 j - 1) i units.
    border = (2 * torch.arange(1, levels + 1, device=residual.device) - 1) * (steps[:, None] + 1)  # (GRID, levels)
    count, total = count[:, border], total[:, border]
    weight = (2 * torch.arange(1, levels + 1, device=residual.device) - 1).double()
    # sum((r - S q)^2) less sum(r^2), with sum(|r| |q|) and sum(q^2) taken level by level.
    step = candidates.double()
    error = step.square() * (count * weight).sum(-1) - 2 * step * total.sum(-1)
    scale = candidates.gather(1, error.argmin(1, keepdim=True))

    codes = torch.round(residual / torch.where(scale > 0, scale, 1.0)).clamp_(-levels, levels)
    return codes.to(torch.int8), scale[:, 0].half()


def _histogram(magnitude: Tensor, per_unit: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Numbers and sums, float64 ``(rows, bins)``, of a row's values that lie in bin ``b`` or above."""
    rows = len(magnitude)
    place = (magnitude * per_unit[:, None]).int().clamp_(max=bins - 1).long()
    place += bins * torch.arange(rows, device=magnitude.device)[:, None]
    place, values = place.flatten(), magnitude.flatten().double()
    count = torch.bincount(place, minlength=rows * bins).double()
    total = torch.zeros_like(count).scatter_add_(0, place, values)
    return tuple(part.view(rows, bins).flip(1).cumsum(1).flip(1) for part in (count, total))


def quantize_nested(residual: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Codes int8 ``(d_out, d_in)``, 1, 2 or 4 bits, that split the base grid's own step into ``2**bits`` parts.

    ``scales`` is the base weights' float16 ``(groups, d_out)``; a residual beyond half a step takes the outermost part.
    """
    if bits not in (1, 2, 4):
        raise UserError(f"bits: expected 1, 2 or 4 for a nested residual, got {bits}")
    d_out, d_in = residual.shape
    step = scales.float().t()[:, :, None]
    grouped = residual.float().view(d_out, len(scales), d_in // len(scales))
    half = 2 ** (bits - 1)
    return torch.floor(grouped * 2**bits / step).clamp_(-half, half - 1).to(torch.int8).view(d_out, d_in)


def pack_layer(residual: Tensor, bits: int, nested_scales: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """One layer's cheatsheet entry from its residual ``(d_out, d_in)``.

    Returns the packed rows, uint8 ``(d_in, row_bytes)``, and their scales, float16 ``(groups, d_out)``: one group, the base
    weights' own with ``nested_scales``, None at 16 bits, where the residual itself is kept as float16.
    """
    if bits == 16 and nested_scales is None:
        if not bool(residual.isfinite().all()):
            raise UserError("residual: expected finite values; the original or the quantized weights hold NaN or Inf")
        return packing.pack_residual(residual.t(), 16), None
    if nested_scales is not None:
        return packing.pack_residual(quantize_nested(residual, nested_scales, bits).t(), bits), nested_scales
    codes, scale = quantize_residual(residual, bits)
    return packing.pack_residual(codes.t(), bits), scale[None]
