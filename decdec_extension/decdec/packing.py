"""Every bit layout of DecDEC, pack beside unpack. Nowhere else is a layout known (but for the C++ that reads it).

Base weights: the tile layout, version 1
----------------------------------------
A ``(d_out, d_in)`` matrix of ``bits``-bit codes (2, 3 or 4) becomes an int32 tensor of shape
``(ceil(d_out / 16), ceil(d_in / 64), bits, 32)``, exactly ``bits`` bits a weight: row tile, unit of 64 inputs, word, lane.
A unit is what one warp multiplies with two ``mma.m16n8k32`` steps, and lane ``4 g + t`` finds its own 32 codes in its
``bits`` words. Those are four groups ``q = 2 s + h`` of eight codes ``j``, code ``(q, j)`` being

    row    16 * tile + g + 8 h
    input  64 * unit + 32 s + 16 (j // 4) + 4 t + j % 4

Code ``j`` lies in nibble ``j`` (bits ``4 j`` up) of a word:

* 4 bits: word ``q`` holds group ``q``.
* 3 bits: words 0..2 hold groups 0..2 in the low three bits of each nibble. The spare fourth bit of word ``m`` is bit ``m``
  of group 3's code, so that three words hold 32 codes and a byte permute can use a masked word as its selector.
* 2 bits: word ``m`` holds group ``m`` in the low and group ``m + 2`` in the high two bits of each nibble.

Rows and inputs beyond the matrix are code 0; readers multiply them with zero activations or drop their rows.

Residuals: the row layout, version 1
------------------------------------
``(d_in, row_bytes)`` uint8, one row an input channel, outputs in natural order, lowest bits first: output ``o`` of a
``bits``-bit residual lies in byte ``o * bits // 8`` from bit ``o * bits % 8``. A row is padded to a multiple of 16 bytes, so
that every row can be read by 16-byte loads. The unsigned code is ``c + 2**(bits - 1)``. A row of 3 bits is the 2-bit row of the
codes' high bits, then the 1-bit row of their low bits, each padded. At 16 bits a row is ``d_out`` float16.
"""

import torch
from torch import Tensor

TILE_LAYOUT_VERSION = 1
RESIDUAL_LAYOUT_VERSION = 1

TILE_ROWS = 16
UNIT_INPUTS = 64
ROW_ALIGN = 16

BASE_BITS = (2, 3, 4)
RESIDUAL_BITS = (1, 2, 3, 4, 8, 16)


def packed_shape(d_out: int, d_in: int, bits: int) -> tuple[int, int, int, int]:
    """Shape of the packed int32 tensor of a ``(d_out, d_in)`` matrix of ``bits``-bit codes."""
    return (-(-d_out // TILE_ROWS), -(-d_in // UNIT_INPUTS), bits, 32)


def residual_row_bytes(d_out: int, bits: int) -> int:
    """Bytes of one packed residual row: ``d_out`` codes of ``bits`` bits, rounded up to 16 bytes (3 bits: those of 2 and of 1)."""
    if bits == 3:
        return residual_row_bytes(d_out, 2) + residual_row_bytes(d_out, 1)
    return -(-(-(-d_out * bits // 8)) // ROW_ALIGN) * ROW_ALIGN


def _check_codes(codes: Tensor, bits: int, allowed: tuple[int, ...]) -> None:
    if bits not in allowed:
        raise ValueError(f"bits: expected one of {allowed}, got {bits}")
    if codes.dim() != 2:
        raise ValueError(f"codes: expected a matrix, got shape {tuple(codes.shape)}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes: expected values in 0..{(1 << bits) - 1}, got {int(codes.min())}..{int(codes.max())}")


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes ``(d_out, d_in)`` of any integer dtype into the tile layout, int32."""
    _check_codes(codes, bits, BASE_BITS)
    d_out, d_in = codes.shape
    tiles, units = packed_shape(d_out, d_in, bits)[:2]
    full = codes.new_zeros((tiles * TILE_ROWS, units * UNIT_INPUTS), dtype=torch.int64)
    full[:d_out, :d_in] = codes
    # (tile, h, g, unit, s, j // 4, t, j % 4) -> (tile, unit, s, h, g, t, j): group q = 2 s + h, lane 4 g + t
    groups = full.view(tiles, 2, 8, units, 2, 2, 4, 4).permute(0, 3, 4, 1, 2, 6, 5, 7).reshape(tiles, units, 4, 32, 8)
    shifts = 4 * torch.arange(8, device=codes.device)
    nibbles = (groups << shifts).sum(-1)  # (tiles, units, 4, 32): group q in the nibbles of one word
    if bits == 4:
        words = nibbles
    elif bits == 3:
        q3 = nibbles[:, :, 3]
        spare = torch.stack([((q3 >> m) & 0x11111111) << 3 for m in range(3)], dim=2)
        words = nibbles[:, :, :3] | spare
    else:
        words = nibbles[:, :, :2] | (nibbles[:, :, 2:] << 2)
    return _to_int32(words)


def unpack_codes(qweight: Tensor, d_out: int, d_in: int) -> Tensor:
    """The uint8 codes ``(d_out, d_in)`` of a tensor made by :func:`pack_codes`; its bits are ``qweight.shape[2]``."""
    tiles, units, bits, lanes = qweight.shape
    if (tiles, units, bits, lanes) != packed_shape(d_out, d_in, bits) or bits not in BASE_BITS:
        raise ValueError(f"qweight: expected shape {packed_shape(d_out, d_in, bits)}, got {tuple(qweight.shape)}")
    words = qweight.to(torch.int64) & 0xFFFFFFFF
    if bits == 4:
        nibbles = words
    elif bits == 3:
        q3 = sum(((words[:, :, m] >> 3) & 0x11111111) << m for m in range(3))
        nibbles = torch.cat([words & 0x77777777, q3.unsqueeze(2)], dim=2)
    else:
        nibbles = torch.cat([words & 0x33333333, (words >> 2) & 0x33333333], dim=2)
    shifts = 4 * torch.arange(8, device=qweight.device)
    groups = ((nibbles.unsqueeze(-1) >> shifts) & 0xF).to(torch.uint8)  # (tiles, units, 4, 32, 8)
    full = groups.view(tiles, units, 2, 2, 8, 4, 2, 4).permute(0, 3, 4, 1, 2, 6, 5, 7)
    return full.reshape(tiles * TILE_ROWS, units * UNIT_INPUTS)[:d_out, :d_in].contiguous()


def pack_residual(codes: Tensor, bits: int) -> Tensor:
    """Pack residual codes into the row layout.

    ``codes`` is ``(d_in, d_out)``: signed integers in ``-2**(bits-1) .. 2**(bits-1)-1`` for 1 to 8 bits, the residual
    itself (stored as float16) for 16. Returns uint8 ``(d_in, residual_row_bytes(d_out, bits))``.
    """
    if bits not in RESIDUAL_BITS:
        raise ValueError(f"bits: expected one of {RESIDUAL_BITS}, got {bits}")
    d_in, d_out = codes.shape
    packed = torch.zeros((d_in, residual_row_bytes(d_out, bits)), dtype=torch.uint8, device=codes.device)
    if bits == 16:
        packed[:, : 2 * d_out] = codes.to(torch.float16).contiguous().view(torch.uint8)
        return packed
    unsigned = codes.to(torch.int16) + (1 << (bits - 1))
    _check_codes(unsigned, bits, RESIDUAL_BITS)
    if bits == 3:
        return torch.cat([pack_residual((unsigned >> 1) - 2, 2), pack_residual((unsigned & 1) - 1, 1)], dim=1)
    per_byte = 8 // bits
    width = -(-d_out // per_byte) * per_byte
    padded = torch.zeros((d_in, width), dtype=torch.uint8, device=codes.device)
    padded[:, :d_out] = unsigned.to(torch.uint8)
    for slot in range(per_byte):
        packed[:, : width // per_byte] |= padded[:, slot::per_byte] << (slot * bits)
    return packed


def unpack_residual(residual: Tensor, bits: int, d_out: int) -> Tensor:
    """Signed int8 codes ``(d_in, d_out)`` of a packed residual (float16 values at 16 bits)."""
    if bits not in RESIDUAL_BITS:
        raise ValueError(f"bits: expected one of {RESIDUAL_BITS}, got {bits}")
    if residual.dim() != 2 or residual.shape[1] != residual_row_bytes(d_out, bits):
        raise ValueError(f"residual: expected {residual_row_bytes(d_out, bits)} bytes a row, got {tuple(residual.shape)}")
    if bits == 16:
        return residual[:, : 2 * d_out].contiguous().view(torch.float16)
    if bits == 3:
        high, low = residual.split([residual_row_bytes(d_out, 2), residual_row_bytes(d_out, 1)], dim=1)
        return 2 * unpack_residual(high, 2, d_out) + unpack_residual(low, 1, d_out) + 1
    per_byte = 8 // bits
    shifts = bits * torch.arange(per_byte, device=residual.device, dtype=torch.uint8)
    codes = (residual.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    signed = codes.flatten(1)[:, :d_out].to(torch.int16) - (1 << (bits - 1))
    return signed.to(torch.int8)


def pack_codebook(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Fixed-point form of a float codebook ``(d_out, 2**bits)``: int16 entries and one float32 scale per output channel.

    The largest entry of a row maps to 32767, so an entry is off by at most 2**-16 of it: less than float16 loses on that
    entry. Integer tables let the kernels look up and multiply in exact integer arithmetic.
    """
    codebook = codebook.float()
    scale = codebook.abs().amax(dim=1) / 32767
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.round(codebook / safe[:, None]).to(torch.int16), scale


def _to_int32(words: Tensor) -> Tensor:
    """The same 32 bits as a signed integer."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
