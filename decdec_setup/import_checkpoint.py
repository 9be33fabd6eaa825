"""Turns a quantized checkpoint of another program (GPTQ, AWQ, HQQ, compressed-tensors) into a folder that DecDEC runs.

Its codes and grids are repacked, never rounded again: the model computes what it did before. With the original model,
which gives the residuals, cheatsheet.py and thresholds.py follow as for any folder; scales that were folded into the
original before it was quantized (AWQ) are found by comparing the two.
"""

import argparse
import os
import shutil
import sys
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from decdec.artifacts import QuantConfig
from decdec.errors import UserError, run
from decdec.files import config_hash, tensors_hash, write_json
from decdec.models import block_of, decoder_blocks, local_folder, original_hash
from decdec.packing import BASE_BITS, pack_codes

from base_model import BaseModel
from folder import COPIED, atomic_folder, check_out, dated_identity, holds, model_identity, save_tensors, summary
from foreign import ForeignFolder
from foreign_formats import ForeignLayer
from model_card import card
from scaling import SCALING, TOO_FAR, scaled_state
from unfold_scaling import find_scaling


@dataclass
class _Packed:
    """One layer in the tile layout; ``scales`` and ``zeros`` float16 ``(groups, d_out)`` of its own group size."""

    bits: int
    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int
    order: Tensor | None


def _pack(name: str, layer: ForeignLayer) -> _Packed:
    """Repack a layer; inputs whose groups do not lie side by side are taken in an order in which they do."""
    d_in = layer.codes.shape[1]
    order, bits = None, max(layer.bits, min(BASE_BITS))
    regular = torch.arange(d_in) // layer.group_size
    if not torch.equal(layer.group_of, regular):
        order = torch.sort(layer.group_of, stable=True).indices
        if not torch.equal(layer.group_of[order], regular):
            raise UserError(f"{name}: expected groups of {layer.group_size} inputs each, got an index of uneven groups")
    codes = layer.codes if order is None else layer.codes[:, order]
    grid = (part.t().contiguous().half() for part in (layer.scales, layer.zeros))
    return _Packed(bits, pack_codes(codes, bits), *grid, layer.group_size, None if order is None else order.int())


def _tensors(packed: dict[str, _Packed], widths: dict[str, int]) -> tuple[dict[str, Tensor], int, bool]:
    """The tensors of all layers with one group size for all, that size, and whether layers have orders."""
    group_size = gcd(*(gcd(layer.group_size, widths[name]) for name, layer in packed.items()))
    ordered = any(layer.order is not None for layer in packed.values())
    tensors = {}
    for name, layer in packed.items():
        repeats, groups = layer.group_size // group_size, widths[name] // group_size
        tensors[f"{name}.qweight"] = layer.qweight
        for part in ("scales", "zeros"):
            tensors[f"{name}.{part}"] = getattr(layer, part).repeat_interleave(repeats, dim=0)[:groups].contiguous()
        if ordered:
            natural = torch.arange(widths[name], dtype=torch.int32)
            tensors[f"{name}.order"] = natural if layer.order is None else layer.order
    return tensors, group_size, ordered


def import_checkpoint(foreign: str, out: str | Path, model: str | None = None) -> bool:
    """Write the DecDEC folder ``out`` of the checkpoint ``foreign``; False if it is there already.

    ``model``: the original, a folder or hub id. Layers of more than 4 bits, which no kernel here reads, are kept
    dequantized and are not compensated.
    """
    source, out = local_folder(foreign), Path(out)
    original = local_folder(model) if model else None
    config_id, dated = (config_hash({"foreign": identity(source), "model": identity(original) if original else None})
                        for identity in (model_identity, dated_identity))
    check_out(out)
    if holds(out, (config_id, dated)):
        return False
    folder = ForeignFolder(source)
    base = BaseModel(original) if original else None
    rest = dict(folder.rest())
    packed, scaling, dense = _read(folder, base, rest)
    if not packed:
        raise UserError(f"{source}: expected layers of 1 to {max(BASE_BITS)} bits, got only wider ones, which leave "
                        "little to compensate")
    if dense:
        print(f"{len(dense)} layers are kept dequantized, as {min(dense)}: no kernel here reads them", file=sys.stderr)
        dtype = next(tensor.dtype for tensor in rest.values() if tensor.is_floating_point())
        rest |= {f"{name}.weight": weight.to(dtype) for name, weight in dense.items()}
    widths = {name: folder.layers[name].in_features for name in packed}
    tensors, group_size, ordered = _tensors(packed, widths)
    bits = min(layer.bits for layer in packed.values())
    named = (os.path.relpath(original, out) if Path(model).is_dir() else model) if model else str(foreign)
    quant = QuantConfig(method=folder.settings["quant_method"], format="uniform", bits=bits, group_size=group_size,
                        base_model=named, weights_hash=tensors_hash(sorted(tensors.items())),
                        calibration={"imported_from": source.resolve().name, "config_hash": config_id}
                        | ({"original": original_hash(original)} if original else {}),
                        layer_bits={name: layer.bits for name, layer in packed.items() if layer.bits != bits},
                        dense=sorted(dense), ordered=ordered)
    with atomic_folder(out) as target:
        for place in (original, source):  # the checkpoint's own files last, over the original's
            for file in (file for pattern in COPIED for file in place.glob(pattern)) if place else ():
                shutil.copyfile(file, target / file.name)
        save_tensors(target / "model.safetensors", rest | tensors)
        if scaling:
            save_tensors(target / SCALING, scaling)
        (target / "README.md").write_text(card(out.resolve().name, quant), encoding="utf-8")
        write_json(target / "config.json", folder.config | {"quantization_config": quant.to_dict()})
    if not scaling:
        (out / SCALING).unlink(missing_ok=True)
    return True


def _read(folder: ForeignFolder, base: BaseModel | None,
          rest: dict[str, Tensor]) -> tuple[dict[str, _Packed], dict[str, Tensor], dict[str, Tensor]]:
    """``(packed layers, scales that were folded, weights of layers that cannot be packed)``, block by block."""
    packed: dict[str, _Packed] = {}
    scaling: dict[str, Tensor] = {}
    prefix, blocks = decoder_blocks(folder.model)
    dense = {name: folder.layer(name).dense() for name in folder.layers if not name.startswith(f"{prefix}.")}  # a head
    for index in tqdm(range(len(blocks)), desc="import", unit="block"):
        layers = {name: folder.layer(name) for name in folder.layers if name.startswith(f"{prefix}.{index}.")}
        if base is not None:
            scaling |= _compare(folder, base, index, {name: layer.dense() for name, layer in layers.items()}, rest)
        for name, layer in layers.items():
            if layer.bits > max(BASE_BITS):
                dense[name] = layer.dense()
            else:
                packed[name] = _pack(name, layer)
    return packed, scaling, dense


def _compare(folder: ForeignFolder, base: BaseModel, index: int, weights: dict[str, Tensor],
             rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scales that were folded into block ``index``; refuses an original that is of another model."""
    linears = base.linears()
    for name, weight in weights.items():
        if name not in linears or linears[name].weight.shape != weight.shape:
            raise UserError(f"model: {base.folder}: expected a layer {name} of {tuple(weight.shape)} as in "
                            f"{folder.folder}; give the model that was quantized")
    every = {name: weights.get(name, rest.get(f"{name}.weight")) for name in linears if block_of(name) == index}
    scaling = find_scaling(base, index, rest, every)
    for name, weight in weights.items():
        original = scaled_state(f"{name}.weight", base.tensor(f"{name}.weight"), scaling).float()
        if float((original - weight).norm()) > TOO_FAR * float(original.norm()):
            raise UserError(f"model: {name} of {folder.folder} is not a rounding of that of {base.folder}; "
                            "give the model that was quantized")
    return scaling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("foreign", metavar="FOREIGN", help="folder or hub id of the quantized checkpoint")
    parser.add_argument("out", metavar="OUT", help="model folder to write")
    parser.add_argument("--model", metavar="ORIGINAL", help="the model that was quantized, a folder or hub id; without "
                                                            "it the folder runs, but cheatsheet.py cannot follow")
    args = parser.parse_args()
    if import_checkpoint(args.foreign, args.out, args.model):
        print(summary(Path(args.out)))
    else:
        print(f"{args.out} already holds this checkpoint; nothing to do")


if __name__ == "__main__":
    run(main)
