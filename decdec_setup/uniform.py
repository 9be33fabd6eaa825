"""Group-wise uniform quantization with zero points: the grid of round-to-nearest and of AWQ."""

from math import gcd

import torch
from torch import Tensor

from decdec.errors import UserError
from decdec.packing import pack_codes


def default_group_size(widths: list[int]) -> int:
    """The largest divisor of 128 that divides every layer's d_in."""
    return gcd(128, *widths)


def check_group_size(group_size: int, widths: list[int]) -> None:
    bad = next((width for width in widths if group_size < 1 or width % group_size), None)
    if bad is not None:
        raise UserError(f"group-size: expected a divisor of every layer's inputs, got {group_size} for {bad} inputs")


def grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """``(scale, zero)`` of the asymmetric grid that covers ``low .. high`` and zero; float32 values that float16 holds."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    top = 2**bits - 1
    scale = ((high - low) / top).half().float()
    # A group of zeros has no width; any scale serves it. The smallest normal float16 keeps code * scale exact.
    scale = torch.where(scale > 0, scale.clamp(min=2.0**-14), torch.ones_like(scale))
    return scale, torch.round(-low / scale).clamp(0, top)


def encode(grouped: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes (float) of ``(d_out, groups, group_size)`` weights on the grid ``(d_out, groups)``."""
    return (torch.round(grouped / scale[..., None]) + zero[..., None]).clamp_(0, 2**bits - 1)


def fake_quantize(grouped: Tensor, bits: int, limit: Tensor | None = None) -> Tensor:
    """``grouped`` rounded to its grid; ``limit`` ``(d_out, groups)`` clips the range first, as AWQ does."""
    low, high = grouped.amin(-1), grouped.amax(-1)
    if limit is not None:
        low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
    scale, zero = grid(low, high, bits)
    return (encode(grouped, scale, zero, bits) - zero[..., None]) * scale[..., None]


def pack_uniform(name: str, weight: Tensor, bits: int, group_size: int, limit: Tensor | None = None) -> dict[str, Tensor]:
    """The packed tensors of a ``(d_out, d_in)`` weight: ``NAME.qweight``, ``NAME.scales``, ``NAME.zeros``."""
    grouped = weight.float().unflatten(1, (-1, group_size))
    if not bool(grouped.isfinite().all()):
        raise UserError(f"model: {name} has weights that are not finite")
    low, high = grouped.amin(-1), grouped.amax(-1)
    if limit is not None:
        low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
    scale, zero = grid(low, high, bits)
    return pack_grid(name, encode(grouped, scale, zero, bits).flatten(1).to(torch.uint8), scale, zero, bits)


def pack_grid(name: str, codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> dict[str, Tensor]:
    """The packed tensors of uint8 codes ``(d_out, d_in)`` on the grid ``scale``, ``zero`` ``(d_out, groups)``."""
    return {f"{name}.qweight": pack_codes(codes, bits).cpu(), f"{name}.scales": scale.t().half().contiguous().cpu(),
            f"{name}.zeros": zero.t().half().contiguous().cpu()}
