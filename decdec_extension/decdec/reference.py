"""Every op of :mod:`decdec.ops` in plain fp32 PyTorch, written from the paper: the specification the kernels are tested against.

Clear before fast: no function here is on a hot path. Arguments and shapes are those of the op of the same name.
"""

import torch
from torch import Tensor

from decdec import packing

CHUNK = 1024
BUCKETS = 32


def chunk_counts(d_in: int, k_chunk: int) -> list[int]:
    """Channels selected in each 1024-wide chunk of an input of ``d_in`` channels.

    The last chunk may be narrower; its share is proportional, rounded up, so that ``k_chunk = 1024`` selects every channel
    and no chunk is left out while ``k_chunk > 0``.
    """
    widths = [min(CHUNK, d_in - start) for start in range(0, d_in, CHUNK)]
    return [-(-k_chunk * width // CHUNK) for width in widths]


def bucket_floors(b_0: float, b_15: float) -> Tensor:
    """Lower bounds of the 32 buckets, descending, float32 (section 4.3 of the paper).

    ``floor[0] = b_0`` and ``floor[15] = b_15`` with even steps between, then even steps from ``b_15`` down to
    ``floor[31] = 0``. A finite ``|x|`` falls in the first bucket whose floor it reaches. Computed in float64, rounded once.
    """
    upper = [b_0 + (b_15 - b_0) * i / 15 for i in range(15)] + [b_15]
    lower = [b_15 * (31 - i) / 16 for i in range(16, BUCKETS)]
    return torch.tensor(upper + lower, dtype=torch.float64).float()


def select_channels(x: Tensor, k_chunk: int, b_0: float | None = None, b_15: float | None = None,
                    center: Tensor | None = None) -> Tensor:
    x = x.float() if center is None else x.float() - center.float()
    rows = []
    for row in x:
        chosen = []
        for chunk, count in enumerate(chunk_counts(x.shape[1], k_chunk)):
            start = chunk * CHUNK
            magnitude = row[start:start + CHUNK].abs()
            # Rank of a channel: its bucket for the paper's selection, its magnitude for the exact one. Ties and the bucket
            # that overflows are cut at the lowest index, which a stable sort gives. NaN and Inf are in no bucket.
            if b_0 is None:
                key = -magnitude
            else:
                reached = magnitude[:, None] >= bucket_floors(b_0, b_15)[None, :]
                key = reached.int().argmax(dim=1).float()
            key = torch.where(magnitude.isfinite(), key, torch.inf)
            finite = int(magnitude.isfinite().sum())
            order = torch.sort(key, stable=True).indices[:min(count, finite)]
            kept = torch.sort(order).values + start
            chosen.append(torch.cat([kept, kept.new_full((count - len(kept),), -1)]))
        rows.append(torch.cat(chosen))
    return torch.stack(rows).to(torch.int32)


def codebook_dequantize(qweight: Tensor, codebook: Tensor, scale: Tensor, d_in: int, dtype: torch.dtype) -> Tensor:
    codes = packing.unpack_codes(qweight, codebook.shape[0], d_in).long()
    return (torch.gather(codebook.float(), 1, codes) * scale[:, None]).to(dtype)


def uniform_dequantize(qweight: Tensor, scales: Tensor, zeros: Tensor, d_in: int, dtype: torch.dtype) -> Tensor:
    groups, d_out = scales.shape
    codes = packing.unpack_codes(qweight, d_out, d_in).float().view(d_out, groups, d_in // groups)
    weight = (codes - zeros.float().t()[:, :, None]) * scales.float().t()[:, :, None]
    return weight.reshape(d_out, d_in).to(dtype)


def residual_dequantize(residual: Tensor, residual_scale: Tensor | None, residual_bits: int, nested: bool, d_out: int,
                        dtype: torch.dtype) -> Tensor:
    codes = packing.unpack_residual(residual, residual_bits, d_out).float()
    if residual_bits == 16:
        return codes.to(dtype)
    d_in, groups = codes.shape[0], residual_scale.shape[0]
    step = residual_scale.float().repeat_interleave(d_in // groups, dim=0)  # one row of scales for every input channel
    if nested:
        codes, step = codes + 0.5, step / 2**residual_bits
    return (codes * step).to(dtype)


def residual_quantize(residual: Tensor, residual_bits: int) -> tuple[Tensor, Tensor]:
    levels = 2 ** (residual_bits - 1) - 1
    codes, scales = torch.empty_like(residual, dtype=torch.int8), residual.new_empty(len(residual), dtype=torch.float16)
    for o, row in enumerate(residual):
        largest = float(row.abs().max() / levels)
        candidates = torch.linspace(largest / 32, largest, 32)[:, None]
        steps = torch.where(candidates > 0, row / candidates, 0.0)
        tried = torch.round(steps).clamp(-levels, levels)
        best = (tried * candidates - row).square().mean(1).argmin()
        codes[o], scales[o] = tried[best].to(torch.int8), candidates[best, 0].half()
    return codes, scales


def _with_bias(product: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (product if bias is None else product + bias.float()).to(dtype)


def codebook_gemv(x: Tensor, qweight: Tensor, codebook: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    weight = codebook_dequantize(qweight, codebook, scale, x.shape[1], torch.float32)
    return _with_bias(x.float() @ weight.t(), bias, x.dtype)


def uniform_gemv(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None) -> Tensor:
    weight = uniform_dequantize(qweight, scales, zeros, x.shape[1], torch.float32)
    return _with_bias(x.float() @ weight.t(), bias, x.dtype)


def _residual_product(x: Tensor, indices: Tensor, residual: Tensor, residual_scale: Tensor | None, residual_bits: int,
                      nested: bool, d_out: int, center: Tensor | None, row_scale: Tensor | None) -> Tensor:
    x = x.float() if center is None else x.float() - center.float()
    dense = residual_dequantize(residual, residual_scale, residual_bits, nested, d_out, torch.float32)
    if row_scale is not None:
        dense = dense * row_scale[:, None]
    chosen = indices.long()
    values = torch.where(chosen >= 0, torch.gather(x, 1, chosen.clamp(min=0)), 0.0)
    return torch.einsum("bk,bko->bo", values, dense[chosen.clamp(min=0)])


def residual_gemv(x: Tensor, indices: Tensor, residual: Tensor, residual_scale: Tensor | None, residual_bits: int,
                  nested: bool, d_out: int, center: Tensor | None = None, row_scale: Tensor | None = None) -> Tensor:
    return _residual_product(x, indices, residual, residual_scale, residual_bits, nested, d_out, center, row_scale).to(x.dtype)


def codebook_gemv_compensated(x: Tensor, qweight: Tensor, codebook: Tensor, scale: Tensor, bias: Tensor | None,
                              residual: Tensor, residual_scale: Tensor | None, residual_bits: int, nested: bool,
                              k_chunk: int, b_0: float | None = None, b_15: float | None = None,
                              center: Tensor | None = None, row_scale: Tensor | None = None) -> Tensor:
    base = codebook_gemv(x.float(), qweight, codebook, scale, bias)
    indices = select_channels(x, k_chunk, b_0, b_15, center)
    return (base + _residual_product(x, indices, residual, residual_scale, residual_bits, nested, codebook.shape[0],
                                     center, row_scale)).to(x.dtype)


def uniform_gemv_compensated(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None,
                             residual: Tensor, residual_scale: Tensor | None, residual_bits: int, nested: bool,
                             k_chunk: int, b_0: float | None = None, b_15: float | None = None,
                             center: Tensor | None = None, row_scale: Tensor | None = None) -> Tensor:
    base = uniform_gemv(x.float(), qweight, scales, zeros, bias)
    indices = select_channels(x, k_chunk, b_0, b_15, center)
    return (base + _residual_product(x, indices, residual, residual_scale, residual_bits, nested, scales.shape[1],
                                     center, row_scale)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def silu_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor, rotary_scaling: float) -> Tensor:
    """Rotary positions int64 ``(T,)`` on the first ``2 * len(frequencies)`` numbers of every head of ``x`` ``(T, heads, head_dim)``."""
    angles = (positions[:, None].float() * frequencies)[:, None]
    cosine, sine = ((f(angles) * rotary_scaling).to(x.dtype) for f in (torch.cos, torch.sin))
    first, second, rest = x.split((len(frequencies), len(frequencies), x.shape[-1] - 2 * len(frequencies)), dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), dim=-1)


def attend(qkv: Tensor, position: Tensor, keys: Tensor, values: Tensor, frequencies: Tensor, rotary_scaling: float,
           long_from: int, scaling: float, window: int, q_norm: Tensor | None = None, k_norm: Tensor | None = None,
           eps: float = 1e-6, live_at_most: int = 0, workspace: Tensor | None = None) -> Tensor:
    kv_heads, _, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q, k, v = qkv.view(1, -1, head_dim).split((heads, kv_heads, kv_heads), dim=1)
    q = q if q_norm is None else rms_norm(q, q_norm, eps)
    k = k if k_norm is None else rms_norm(k, k_norm, eps)
    at = int(position)
    row = frequencies[-1 if at >= long_from else 0]
    keys[:, at], values[:, at] = rotate(k, position, row, rotary_scaling)[0], v[0]
    seen = slice(max(0, at + 1 - window) if window else 0, at + 1)
    q = rotate(q, position, row, rotary_scaling)[0].float()
    out = torch.nn.functional.scaled_dot_product_attention(q[None, :, None], keys[None, :, seen].float(),
                                                           values[None, :, seen].float(), scale=scaling, enable_gqa=True)
    return out.reshape(1, -1).to(qkv.dtype)


def head_gemv(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    logits = x.float() @ weight.float().t()
    return logits if scale is None else logits * scale


def argmax(x: Tensor, workspace: Tensor | None = None) -> Tensor:
    return x.argmax(dim=1)
