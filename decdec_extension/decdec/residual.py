"""Residual quantization (section 4.2 of the paper): from ``W - W_q`` to packed rows and their scales."""

import torch
from torch import Tensor

from decdec import ops, packing
from decdec.errors import UserError


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
    """One layer's cheatsheet entry from its residual, float32 ``(d_out, d_in)`` on the CPU.

    Returns the packed rows, uint8 ``(d_in, row_bytes)``, and their scales, float16 ``(groups, d_out)``: one group
    (:func:`decdec.ops.residual_quantize`), the base weights' own with ``nested_scales``, None at 16 bits, where the residual
    itself is kept as float16.
    """
    if not bool(residual.isfinite().all()):
        raise UserError("residual: expected finite values; the original or the quantized weights hold NaN or Inf")
    if nested_scales is not None:
        return packing.pack_residual(quantize_nested(residual, nested_scales, bits).t(), bits), nested_scales
    if bits == 16:
        return packing.pack_residual(residual.t(), 16), None
    codes, scale = ops.residual_quantize(residual, bits)
    return packing.pack_residual(codes.t(), bits), scale[None]
