"""The tensors of quantized layers as other programs publish them, read into codes and grids: GPTQ, AWQ, HQQ,
compressed-tensors. None of those programs is needed.

Every reader is ``read(name, tensors, d_out, d_in, settings) -> ForeignLayer``; ``tensors`` gives what is stored under a
name and says with ``in`` whether it is there, ``settings`` is the folder's own quantization config.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from decdec.errors import UserError


@dataclass(frozen=True)
class ForeignLayer:
    """``W[o, i] = scales[o, g] * (codes[o, i] - zeros[o, g])`` with ``g = group_of[i]``.

    ``codes`` uint8 ``(d_out, d_in)`` below ``2**bits``; ``scales`` and ``zeros`` float32 ``(d_out, groups)``;
    ``group_of`` int64 ``(d_in,)``, and ``group_size`` how many inputs a group has (the last may have fewer).
    """

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: Tensor
    group_size: int

    def dense(self) -> Tensor:
        """The weight, float32 ``(d_out, d_in)``."""
        return (self.codes - self.zeros[:, self.group_of]) * self.scales[:, self.group_of]


@dataclass(frozen=True)
class Format:
    """``key``: the tensor that marks a quantized layer; ``own``: all tensors that only quantized layers have."""

    key: str
    own: tuple[str, ...]
    read: Callable[[str, Mapping[str, Tensor], int, int, Mapping], ForeignLayer]


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """``count`` unsigned ``bits``-bit numbers of each row of int32 ``words``, lowest bits first."""
    words = words.to(torch.int64) & 0xFFFFFFFF
    start = torch.arange(count) * bits
    word, offset = start // 32, start % 32
    values = words[:, word] >> offset
    spill = offset + bits > 32
    values[:, spill] |= words[:, word[spill] + 1] << (32 - offset[spill])
    return (values & (2**bits - 1)).to(torch.uint8)


def _regular(d_in: int, groups: int, group_size: int | None) -> tuple[Tensor, int]:
    """``(group_of, group_size)`` of consecutive groups; the size is that stated, if it makes so many groups."""
    stated = group_size if group_size and group_size > 0 else d_in
    size = stated if -(-d_in // stated) == groups else -(-d_in // groups)
    return torch.arange(d_in) // size, size


def _ordered(stored: Tensor, d_in: int, groups: int, group_size: int | None) -> tuple[Tensor, int]:
    """The same of a stored index of groups (activation order)."""
    regular, size = _regular(d_in, groups, group_size)
    group_of = stored.flatten().to(torch.int64)
    return (group_of if len(group_of) == d_in and bool((group_of >= 0).all()) else regular), size


def _variant(settings: Mapping) -> str:
    """Which of its layouts a GPTQ or AWQ folder has; programs differ in what they call the setting."""
    gptq = settings["quant_method"] == "gptq"
    name, default = ("checkpoint_format", "gptq") if gptq else ("version", "gemm")
    return str(settings.get(name) or settings.get("format") or default).lower()


def _read_gptq(name: str, tensors: Mapping[str, Tensor], d_out: int, d_in: int, settings: Mapping) -> ForeignLayer:
    """Words along the inputs; zero points along the outputs, less 1 in the first version of the format."""
    qweight, qzeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    bits, groups = qweight.shape[0] * 32 // d_in, len(scales)
    codes = unpack_bits(qweight.t(), bits, d_in)
    if _variant(settings) == "gptq" and 32 % bits == 0:
        # GPTQModel takes the 1 from whole words, so a zero point of 0 borrows from its neighbour.
        qzeros = qzeros + sum(1 << place for place in range(0, 32, bits))
    zeros = unpack_bits(qzeros, bits, d_out).t().float()
    if _variant(settings) == "gptq" and 32 % bits:
        zeros = (zeros + 1) % 2**bits
    if f"{name}.g_idx" in tensors:
        group_of, size = _ordered(tensors[f"{name}.g_idx"], d_in, groups, settings.get("group_size"))
    else:
        group_of, size = _regular(d_in, groups, settings.get("group_size"))
    return ForeignLayer(bits, codes, scales.t().float(), zeros, group_of, size)


# AWQ's GEMM kernels unpack the even nibbles of a word before the odd ones: where output j of eight lies.
_AWQ_NIBBLE = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


def _read_awq(name: str, tensors: Mapping[str, Tensor], d_out: int, d_in: int, settings: Mapping) -> ForeignLayer:
    """``gemm``: words along the outputs, interleaved; ``gemv``: words along the inputs, in order, grids padded."""
    qweight, qzeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    stated = settings.get("group_size")
    if _variant(settings) == "gemv":
        group_of, size = _regular(d_in, -(-d_in // (stated if stated and stated > 0 else d_in)), stated)
        groups = int(group_of[-1]) + 1
        codes, zeros = unpack_bits(qweight, 4, d_in), unpack_bits(qzeros, 4, groups).float()
        return ForeignLayer(4, codes, scales[:, :groups].float(), zeros, group_of, size)
    place = (torch.arange(d_out // 8)[:, None] * 8 + _AWQ_NIBBLE).flatten()
    codes, zeros = (unpack_bits(words, 4, d_out)[:, place].t() for words in (qweight, qzeros))
    group_of, size = _regular(d_in, len(scales), stated)
    return ForeignLayer(4, codes, scales.t().float(), zeros.float(), group_of, size)


def _read_hqq(name: str, tensors: Mapping[str, Tensor], d_out: int, d_in: int, settings: Mapping) -> ForeignLayer:
    """Rows are groups of inputs; the first part of them lies in the highest bits of a word, the last in the lowest."""
    stored = {part: tensors[f"{name}.{part}"] for part in ("W_q", "scale", "zero", "nbits", "axis")}
    if int(stored["axis"]) != 1:
        raise UserError(f"{name}: its groups run along the outputs (HQQ's axis 0), which no kernel here reads; "
                        "quantize with axis=1")
    if any(int(tensors[flag]) for part in ("scale", "zero") if (flag := f"{name}.quant_{part}") in tensors):
        raise UserError(f"{name}: its scales are quantized themselves, which is not read here")
    bits, groups = int(stored["nbits"]), stored["scale"].numel() // d_out
    words = stored["W_q"]
    if words.is_floating_point():  # HQQ's view_as_float: the same bytes
        words = words.view(torch.int32 if bits == 3 else torch.uint8)
    parts = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}.get(bits)
    if parts is None:
        raise UserError(f"{name}: nbits: expected 1, 2, 3, 4 or 8, got {bits}")
    codes = torch.cat([(words.to(torch.int64) >> bits * (parts - 1 - part)) & (2**bits - 1) for part in range(parts)])
    codes = codes[:d_out * groups].to(torch.uint8).reshape(d_out, d_in)
    grid = (stored[part].float().reshape(d_out, groups) for part in ("scale", "zero"))
    return ForeignLayer(bits, codes, *grid, *_regular(d_in, groups, d_in // groups))


def _read_compressed(name: str, tensors: Mapping[str, Tensor], d_out: int, d_in: int,
                     settings: Mapping) -> ForeignLayer:
    """Signed numbers, packed along the inputs as unsigned ones or kept as int8; zero points along the outputs."""
    schemes = [group["weights"] for group in settings["config_groups"].values()]
    packed = f"{name}.weight_packed" in tensors
    stored, scale = tensors[f"{name}.weight_packed" if packed else f"{name}.weight"], tensors[f"{name}.weight_scale"]
    for scheme in schemes:  # of several, the one with whose bits the words come out
        bits = int(scheme["num_bits"])
        dense_words, padded_words = -(-d_in * bits // 32), -(-d_in // (32 // bits))
        if not packed or stored.shape[1] in (dense_words, padded_words):
            break
    else:
        raise UserError(f"{name}: expected words of {' or '.join(str(s['num_bits']) for s in schemes)} bits for {d_in} "
                        f"inputs, got {stored.shape[1]} words")
    if not packed:
        codes = (stored.to(torch.int16) + 2**(bits - 1)).to(torch.uint8)
    elif stored.shape[1] == dense_words:
        codes = unpack_bits(stored, bits, d_in)
    else:  # early releases left the odd bits of every word empty
        codes = unpack_bits(stored.reshape(-1, 1), bits, 32 // bits).view(d_out, -1)[:, :d_in]
    scale = scale.float().reshape(1 if scale.numel() == 1 else len(scale), -1).expand(d_out, -1)
    zero = torch.full_like(scale, 2**(bits - 1))
    if f"{name}.weight_zero_point" in tensors:
        point = tensors[f"{name}.weight_zero_point"]
        if packed and point.dtype == torch.int32 and len(point) == -(-d_out * bits // 32):
            zero = unpack_bits(point.t(), bits, d_out).t().float()
        else:
            zero = zero + point.float().reshape(1 if point.numel() == 1 else len(point), -1)
    if f"{name}.weight_g_idx" in tensors:
        group_of, size = _ordered(tensors[f"{name}.weight_g_idx"], d_in, scale.shape[1], scheme.get("group_size"))
    else:
        group_of, size = _regular(d_in, scale.shape[1], scheme.get("group_size"))
    return ForeignLayer(bits, codes, scale, zero, group_of, size)


_HQQ_OWN = ("W_q", "scale", "zero", "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype",
            "view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict",
            "stores_quant_config", "channel_wise", "optimize", "round_zero")
FORMATS = {
    "gptq": Format("qweight", ("qweight", "qzeros", "scales", "g_idx"), _read_gptq),
    "awq": Format("qweight", ("qweight", "qzeros", "scales"), _read_awq),
    "hqq": Format("W_q", _HQQ_OWN, _read_hqq),
    "compressed-tensors": Format("weight_scale", ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape",
                                                  "weight_g_idx", "weight", "input_scale", "input_zero_point"),
                                 _read_compressed),
}


def check_settings(settings: Mapping, source: str) -> None:
    """Refuse variants of a format that are not read here."""
    method = settings.get("quant_method")
    if method not in FORMATS:
        raise UserError(f"{source}: quant_method: expected one of {', '.join(FORMATS)}, got {method!r}")
    if method == "gptq":
        _expect(source, "checkpoint_format", _variant(settings), ("gptq", "gptq_v2"))
        _expect(source, "bits", settings.get("bits"), (2, 3, 4, 8))
    elif method == "awq":
        _expect(source, "version", _variant(settings), ("gemm", "gemv"))
        _expect(source, "bits", settings.get("bits"), (4,))
    elif method == "hqq" and "quant_config" in settings:
        for part in ("scale_quant_params", "zero_quant_params"):
            _expect(source, part, settings["quant_config"].get(part), (None,))
    elif method == "compressed-tensors":
        _expect(source, "format", settings.get("format"), ("pack-quantized", "int-quantized", "naive-quantized"))
        for group in settings.get("config_groups", {}).values():
            weights = group.get("weights") or {}
            _expect(source, "weights.type", weights.get("type"), ("int",))
            _expect(source, "weights.strategy", weights.get("strategy"), ("group", "channel", "tensor"))
        if settings.get("transform_config"):
            raise UserError(f"{source}: transform_config: its weights are rotated, which is not read here")


def _expect(source: str, name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise UserError(f"{source}: {name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")
