"""Writes the residuals of a quantized model, what DecDEC fetches from CPU memory: cheatsheet.pt.

Either of a folder made by quantize.py, or (--original, --quantized) of any two Hugging Face folders, the second holding
fake-quantized weights. For AWQ the original is the scaled one, rebuilt from the base model. With --repaired they are the
residuals of what repair.py's static repair leaves: cheatsheet_repaired.pt.
"""

import argparse
import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from decdec import reference
from decdec.artifacts import (CHEATSHEET, REPAIR, REPAIRED_CHEATSHEET, Cheatsheet, QuantConfig, Repair, load_cheatsheet,
                              load_repair, read_quant_config, save_cheatsheet)
from decdec.errors import UserError, check_device, run
from decdec.files import tensors_hash
from decdec.models import block_of, decoder_blocks, decoder_linears, layer_kind, load_model, local_folder, original_hash
from decdec.original import save_original_cheatsheet
from decdec.residual import NESTED_BITS, PAPER_BITS, pack_layer, row_scale_of

from base_model import BaseModel
from folder import original_folder
from parts import Parts
from quantized_blocks import QuantizedBlocks
from scaling import TOO_FAR, read_scaling, scaled_state

LAYOUTS = ("decdec", "original")
# A layer's name, and what gives its original and quantized weights (float32, on the device of choice) and, where residuals are
# nested, the base's own scales or, for a codebook, the row scale.
Layer = tuple[str, Callable[[], tuple[Tensor, Tensor, Tensor | None, Tensor | None]]]


def make_cheatsheet(folder: str | Path, model: str | None = None, bits: int | None = None, nested: bool = False,
                    layout: str = "decdec", out: str | Path | None = None, device: str = "cpu",
                    repaired: bool = False) -> Path | None:
    """Write the cheatsheet of a folder made by quantize.py; returns its path, None if it was there already.

    Residuals in the paper's form, of 4 bits unless said otherwise, or ``nested``, of 2; ``repaired``: of what the folder's static
    repair leaves.
    """
    bits = bits or (2 if nested else 4)
    _check(bits, nested, layout, repaired)
    check_device(device)
    folder = Path(folder)
    quant = read_quant_config(folder)
    repair = load_repair(folder / REPAIR, quant) if repaired else None
    name = REPAIRED_CHEATSHEET if repaired else CHEATSHEET
    out = Path(out) if out else folder / (name if layout == "decdec" else f"original/{name}")
    if layout == "decdec" and _is_there(out, quant, bits, nested, repair):
        Parts.beside(out, {}).clear()  # where a kill came just before
        return None
    if nested and quant.ordered:
        raise UserError(f"nested: expected a folder whose groups are consecutive inputs, {folder} has them in activation order")
    base = BaseModel(original_folder(folder, quant, model))
    layers = _packed_layers(folder, base, nested, device, repair)
    return _write(out, layers, len(base.linears()) - len(quant.dense), quant, base.folder, bits, nested, layout, base.prefix,
                  repair)


def make_from_two_folders(original: str, quantized: str, out: str | Path, bits: int = 4, layout: str = "decdec") -> Path:
    """Write the cheatsheet of ``quantized``, a model folder of fake-quantized weights, against ``original``."""
    _check(bits, False, layout, False)
    base, fake = load_model(original), load_model(quantized)
    weights = {name: module.weight.detach() for name, module in decoder_linears(fake).items()}
    for name, module in decoder_linears(base).items():
        if name not in weights or weights[name].shape != module.weight.shape:
            raise UserError(f"quantized: {quantized}: expected {name} of shape {tuple(module.weight.shape)} as in {original}")
    quant = QuantConfig(method="fake", format="uniform", bits=4, group_size=None, base_model=Path(original).name,
                        weights_hash=tensors_hash(weights.items()))
    layers = ((name, lambda name=name, module=module: (module.weight.detach().float(), weights[name].float(), None, None))
              for name, module in decoder_linears(base).items())
    return _write(Path(out), layers, len(weights), quant, local_folder(original), bits, False, layout, decoder_blocks(base)[0])


def _check(bits: int, nested: bool, layout: str, repaired: bool) -> None:
    allowed = NESTED_BITS if nested else PAPER_BITS
    if bits not in allowed:
        raise UserError(f"bits: expected one of {allowed}{' for nested residuals' if nested else ''}, got {bits}")
    if layout not in LAYOUTS:
        raise UserError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout == "original" and (bits != 4 or nested or repaired):
        raise UserError("layout: the original's holds 4-bit residuals with a scale per output channel only, and knows no repair")


def _is_there(path: Path, quant: QuantConfig, bits: int, nested: bool, repair: Repair | None) -> bool:
    try:
        sheet = load_cheatsheet(path, quant)
    except UserError:
        return False
    return (sheet.bits, sheet.nested, sheet.repair) == (bits, nested, repair and repair.hash)


def _packed_layers(folder: Path, base: BaseModel, nested: bool, device: str, repair: Repair | None) -> Iterator[Layer]:
    scaling, quantized = read_scaling(folder), QuantizedBlocks(folder)
    shapes = {name: module.weight.shape for name, module in base.linears().items() if name not in quantized.quant.dense}
    sharing = defaultdict(list)  # the layers that read one input
    for name in shapes:
        sharing[block_of(name), layer_kind(name)].append(name)

    def weights(name: str) -> tuple[Tensor, Tensor]:
        original = scaled_state(f"{name}.weight", base.tensor(f"{name}.weight").to(device), scaling).float()
        rounded = quantized.weight(name, shapes[name], device)
        if repair and name in repair.layers:
            static = repair.layers[name].to(rounded.device, torch.float32)
            rounded += static.up @ static.down
        return original, rounded

    @functools.lru_cache(maxsize=1)
    def row_scale(block: int, kind: str) -> Tensor:
        return row_scale_of([original - rounded for original, rounded in map(weights, sharing[block, kind])])

    def load(name: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        # What a repair leaves lies within the base grid's step no more.
        uniform = quantized.quant.format == "uniform" and not repair
        return (*weights(name), quantized.parts(name, device)[1] if nested and uniform else None,
                row_scale(block_of(name), layer_kind(name)) if nested and not uniform else None)

    for name in shapes:
        yield name, lambda name=name: load(name)


def _write(out: Path, layers: Iterator[Layer], count: int, quant: QuantConfig, original: Path, bits: int, nested: bool,
           layout: str, prefix: str, repair: Repair | None = None) -> Path:
    repaired = repair and repair.hash
    parts = Parts.beside(out, {"weights": quant.weights_hash, "original": original_hash(original), "bits": bits, "nested": nested,
                               "repair": repaired})
    residual, scale, norms, row_scale = {}, {}, {}, {}
    for number, (name, load) in enumerate(tqdm(layers, total=count, desc="residuals", unit="layer")):
        if not parts.has(number):
            parts.save(number, _pack(*load(), bits, nested))
        part = parts.load(number)
        # Of a folder that says what it was made from, the original is the right one, however coarse the rounding.
        if "original" not in quant.calibration and part["norms"][1] > TOO_FAR * part["norms"][0]:
            raise UserError(f"model: {name} is not a rounding of that of {original}; give the model that was quantized")
        residual[name], scale[name], norms[name] = part["residual"], part.get("scale"), tuple(part["norms"].tolist())
        row_scale |= {name: part["row_scale"]} if "row_scale" in part else {}
    if layout == "original":
        save_original_cheatsheet(out, residual, scale, prefix)
    else:
        save_cheatsheet(out, Cheatsheet(bits, nested, residual, scale, norms, row_scale, repaired), quant)
    parts.clear()
    return out


def _pack(original: Tensor, quantized: Tensor, base_scales: Tensor | None, row_scale: Tensor | None, bits: int,
          nested: bool) -> dict[str, Tensor]:
    """``residual``, ``scale`` (not at 16 bits), ``row_scale`` (if any) and ``norms``, float64 ``(3,)``, of one layer, on the CPU."""
    difference = original - quantized
    # The paper's search runs on the CPU alone; the rest where the layer is.
    rows, scale = pack_layer(difference if nested else difference.cpu(), bits, nested, base_scales, row_scale)
    moved = (rows.to(original.device), None if scale is None else scale.to(original.device))
    kept = reference.residual_dequantize(*moved, bits, nested, len(original), torch.float32)
    if row_scale is not None:
        kept *= row_scale[:, None]
    norms = torch.tensor([float(part.norm()) for part in (original, difference, difference - kept.t())], dtype=torch.float64)
    optional = {"scale": scale, "row_scale": row_scale}
    return {"residual": rows.cpu(), "norms": norms} | {key: tensor.cpu() for key, tensor in optional.items() if tensor is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="folder made by quantize.py")
    parser.add_argument("--model", help="original model, if it is no longer where quantize.py found it")
    parser.add_argument("--nested", action="store_true",
                        help="split the base grid's own step, or for a codebook the interval that fits, instead of the paper's form")
    parser.add_argument("--bits", type=int, help="residual bits: 2, 4, 8 or 16 (default 4); nested 1, 2, 3 or 4 (default 2)")
    parser.add_argument("--repaired", action="store_true", help=f"of what the folder's {REPAIR} leaves: {REPAIRED_CHEATSHEET}")
    parser.add_argument("--layout", default="decdec", help="decdec, or original: the paper's artifact's (default %(default)s)")
    parser.add_argument("--original", help="with --quantized: folder of the original model")
    parser.add_argument("--quantized", help="with --original: folder of the model with fake-quantized weights")
    parser.add_argument("--out", metavar="FILE", help=f"file to write; default {CHEATSHEET} in FOLDER (original/{CHEATSHEET} "
                                                      "in the original's layout)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where the layer at work is held (default %(default)s)")
    args = parser.parse_args()
    if args.folder and not (args.original or args.quantized):
        wrote = make_cheatsheet(args.folder, args.model, args.bits, args.nested, args.layout, args.out, args.device,
                                args.repaired)
    elif args.original and args.quantized and args.out and not (args.folder or args.nested or args.repaired):
        wrote = make_from_two_folders(args.original, args.quantized, args.out, args.bits or 4, args.layout)
    else:
        raise UserError("expected FOLDER, or --original, --quantized and --out (and then no --nested or --repaired)")
    print(json.dumps({"wrote": str(wrote), "bytes": wrote.stat().st_size}) if wrote else
          f"{args.out or args.folder} already holds this cheatsheet; nothing to do")


if __name__ == "__main__":
    run(main)
