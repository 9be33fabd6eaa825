"""Checkpoints of other programs, written from their published layouts with PyTorch and numpy alone."""

import json
import shutil

import numpy as np
import torch
from safetensors.torch import save_file

from decdec import models
from decdec.linear import Compensation

IDS = torch.arange(2, 26)[None]
SIZE = 64  # of a group
EVERYTHING = Compensation(1024, "exact", prefill=True)


def words_of(codes):
    """Rows of unsigned codes as int32 words, each bit where the published layouts have it: lowest first, no gaps."""
    codes, bits = codes
    stream = (codes.numpy()[:, :, None] >> np.arange(bits)) & 1
    stream = stream.reshape(len(codes), -1)
    padded = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32))).astype(np.uint8)
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32).copy())


def rounded(weight, bits, symmetric=False, order=None):
    """Codes ``(d_out, d_in)``, scales and zeros ``(d_out, groups)`` of groups in ``order``, and the weight."""
    order = torch.arange(weight.shape[1]) if order is None else order
    grouped = weight[:, order].reshape(len(weight), -1, SIZE)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / (2**bits - 1)).clamp(min=1e-4).half().float()
    zeros = torch.full_like(scales, 2**(bits - 1)) if symmetric else (-low / scales).round().clamp(0, 2**bits - 1)
    codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    dense = torch.empty_like(weight)
    dense[:, order] = ((codes - zeros[..., None]) * scales[..., None]).flatten(1)
    natural = torch.empty_like(weight)
    natural[:, order] = codes.flatten(1)
    return natural.to(torch.int64), scales, zeros, dense


def gptq(name, weight, bits, act_order=False, first_version=True):
    order = torch.randperm(weight.shape[1]) if act_order else torch.arange(weight.shape[1])
    codes, scales, zeros, dense = rounded(weight, bits, order=order)
    group_of = torch.empty(weight.shape[1], dtype=torch.int32)
    group_of[order] = torch.arange(weight.shape[1], dtype=torch.int32) // SIZE
    zeros = zeros.t().to(torch.int64)
    if not first_version:
        qzeros = words_of((zeros, bits))
    elif bits == 3:
        qzeros = words_of(((zeros - 1) % 8, 3))
    else:  # one less in every field, by one subtraction a word
        qzeros = words_of((zeros, bits)) - words_of((torch.ones_like(zeros), bits))
    return {f"{name}.qweight": words_of((codes, bits)).t(), f"{name}.qzeros": qzeros,
            f"{name}.scales": scales.t().half(), f"{name}.g_idx": group_of}, dense


def awq(name, weight, bits, gemv=False):
    codes, scales, zeros, dense = rounded(weight, bits)
    zeros = zeros.to(torch.int64)
    if gemv:
        padded = torch.nn.functional.pad(scales, (0, -scales.shape[1] % 8))
        return {f"{name}.qweight": words_of((codes, 4)), f"{name}.qzeros": words_of((zeros, 4)),
                f"{name}.scales": padded.half()}, dense
    nibbles = [0, 2, 4, 6, 1, 3, 5, 7]  # the output that lies in each nibble of a word
    take = torch.arange(len(weight)).view(-1, 8)[:, nibbles].flatten()
    return {f"{name}.qweight": words_of((codes[take].t(), 4)), f"{name}.qzeros": words_of((zeros[take].t(), 4)),
            f"{name}.scales": scales.t().half()}, dense


def hqq(name, weight, bits):
    codes, scales, _, _ = rounded(weight, bits)
    zeros = (torch.rand_like(scales) * 2**bits).half().float()  # any number, not only integers
    dense = (codes - zeros.repeat_interleave(SIZE, 1)) * scales.repeat_interleave(SIZE, 1)
    rows = codes.reshape(-1, SIZE)
    parts = {4: 2, 3: 10, 2: 4}[bits]
    rows = torch.cat([rows, rows.new_zeros(-len(rows) % parts, SIZE)]).view(parts, -1, SIZE)
    words = sum(part << bits * (parts - 1 - number) for number, part in enumerate(rows))
    stored = {"W_q": words.to(torch.int32 if bits == 3 else torch.uint8), "scale": scales.half().view(-1, 1),
              "zero": zeros.half().view(-1, 1), "nbits": torch.tensor(bits), "axis": torch.tensor(1),
              "shape": torch.tensor(weight.shape), "group_size": torch.tensor(SIZE), "quant_scale": torch.tensor(0),
              "packing": torch.tensor([*b"4bit_u8"], dtype=torch.uint8), "view_as_float": torch.tensor(0)}
    return {f"{name}.{key}": tensor for key, tensor in stored.items()}, dense


def compressed(name, weight, bits, symmetric=True, packed=True):
    codes, scales, zeros, dense = rounded(weight, bits, symmetric)
    stored = {f"{name}.weight_scale": scales.half(), f"{name}.weight_shape": torch.tensor(weight.shape)}
    if packed:
        stored[f"{name}.weight_packed"] = words_of((codes, bits))
    else:
        stored[f"{name}.weight"] = (codes - 2**(bits - 1)).to(torch.int8)
    if not symmetric:
        point = zeros.to(torch.int64)
        stored[f"{name}.weight_zero_point"] = (words_of((point.t(), bits)).t() if packed else
                                               (point - 2**(bits - 1)).to(torch.int8))
    return stored, dense


def scheme(bits, **more):
    return {"targets": ["Linear"], "weights": {"num_bits": bits, "type": "int", "strategy": "group", "group_size": SIZE,
                                               **more}}


def settings(method, bits):
    """The quantization config that such a folder has."""
    plain = {"quant_method": method, "bits": bits, "group_size": SIZE}
    return {"hqq": {"quant_method": method, "quant_config": {"weight_quant_params": {"nbits": bits}}},
            "compressed-tensors": {"quant_method": method, "format": "pack-quantized",
                                   "config_groups": {"group_0": scheme(bits)}}}.get(method, plain)


def write(source, out, pack, config, model=None):
    """The folder that another program would write of ``source``; returns the dense model that it stands for."""
    model = model or models.load_model(str(source), torch.float32)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for name, linear in models.decoder_linears(model).items():
        stored, dense = pack(name, tensors.pop(f"{name}.weight"))
        tensors |= {key: tensor.contiguous() for key, tensor in stored.items()}
        linear.weight.data.copy_(dense)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("model.safetensors"))
    halved = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in tensors.items()}
    save_file(halved, out / "model.safetensors")
    content = json.loads((out / "config.json").read_text()) | {"quantization_config": config}
    (out / "config.json").write_text(json.dumps(content))
    return model


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits
