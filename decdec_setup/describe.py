"""Prints what a quantized folder holds: layers, bits, bytes on the GPU and in CPU memory, and the errors, by kind of layer."""

import argparse
from collections import defaultdict
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from safetensors import SafetensorError, safe_open

from decdec.artifacts import CHEATSHEET, THRESHOLDS, QuantConfig, load_cheatsheet, load_thresholds, read_quant_config
from decdec.errors import UserError, run
from decdec.files import atomic, read_rows
from decdec.models import KINDS, OTHER, layer_kind

from model_card import card
from quantized_blocks import PARTS

_BYTES = {"F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "F64": 8, "I64": 8, "BOOL": 1}


@dataclass
class Kind:
    """The layers of one kind, shape and bit width, summed up."""

    layers: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    weight: float = 0.0  # squared norms: of the original weights, of the residuals, of what their own rounding leaves
    residual: float = 0.0
    left: float = 0.0
    output: float = 0.0  # mean squared outputs, and what the residuals are predicted to add to them
    error: float = 0.0


def collect(folder: Path, quant: QuantConfig) -> tuple[dict[tuple, Kind], int]:
    """``{(kind, d_out, d_in, bits): Kind}`` in the order of the model, and the bytes of what is not quantized."""
    sheet = load_cheatsheet(folder / CHEATSHEET, quant) if (folder / CHEATSHEET).is_file() else None
    seen = load_thresholds(folder / THRESHOLDS, quant) if (folder / THRESHOLDS).is_file() else None
    kinds: dict[tuple, Kind] = defaultdict(Kind)
    path = folder / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            sizes = {name: _bytes(part) for name, part in slices.items()}
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{path}: expected the packed weights of a model ({error})") from None
    layers = [name.removesuffix(".qweight") for name in sizes if name.endswith(".qweight")]
    for layer in layers:
        parts = [f"{layer}.{part}" for part in PARTS[quant.format]]
        d_out = slices[parts[1]].get_shape()[0 if quant.format == "codebook" else 1]
        if quant.group_size:
            d_in = quant.group_size * slices[parts[1]].get_shape()[0]
        else:  # packed codebook weights are padded to units of 64 inputs
            d_in = len(sheet.residual[layer]) if sheet else 64 * slices[parts[0]].get_shape()[1]
        kind = kinds[layer_kind(layer), d_out, d_in, quant.bits_of(layer)]
        kind.layers += 1
        kind.device_bytes += sum(sizes.pop(part) for part in parts)
        if sheet:
            kind.host_bytes += sheet.residual[layer].nbytes
            own = None if sheet.nested and quant.format == "uniform" else sheet.scale[layer]  # those of the base are counted
            kind.device_bytes += sum(held.nbytes for held in (own, sheet.row_scale.get(layer)) if held is not None)
            weight, residual, left = sheet.norms.get(layer, (0.0, 0.0, 0.0))
            kind.weight, kind.residual, kind.left = kind.weight + weight**2, kind.residual + residual**2, kind.left + left**2
        if seen and layer in seen.row_energy:
            kind.output += float(seen.output_energy[layer])
            kind.error += float((seen.mean_square[layer] * seen.row_energy[layer]).sum())
    return dict(sorted(kinds.items(), key=lambda item: (*KINDS, OTHER).index(item[0][0]))), sum(sizes.values())


def _bytes(part) -> int:
    count = _BYTES[part.get_dtype()]
    for size in part.get_shape():
        count *= size
    return count


def describe(folder: str | Path) -> str:
    """The tables as text."""
    folder = Path(folder)
    quant = read_quant_config(folder)
    kinds, rest = collect(folder, quant)
    bits = sorted({quant.bits, *quant.layer_bits.values()})
    lines = [f"{folder.resolve().name}: {quant.base_model}, {quant.method} ({quant.format}), {' and '.join(map(str, bits))} bits"
             + (f", groups of {quant.group_size}" if quant.group_size else ""),
             "weights " + quant.weights_hash + "".join(f", {key} {value}" for key, value in quant.calibration.items()
                                                       if key not in ("original", "text_hash", "config_hash")), ""]
    rows = [("kind", "layers", "shape (out x in)", "bits", "MB on GPU", "MB pinned", "weight error", "with residual",
             "output error")]
    for (kind, d_out, d_in, b), found in kinds.items():
        rows.append((kind, str(found.layers), f"{d_out} x {d_in}", str(b), _mb(found.device_bytes), _mb(found.host_bytes),
                     _ratio(found.residual, found.weight), _ratio(found.left, found.weight), _ratio(found.error, found.output)))
    rows.append(("rest", "", "", "", _mb(rest), "", "", "", ""))
    rows.append(("all", str(sum(found.layers for found in kinds.values())), "", "",
                 _mb(rest + sum(found.device_bytes for found in kinds.values())),
                 _mb(sum(found.host_bytes for found in kinds.values())), "", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines += ["  ".join(cell.ljust(w) if i in (0, 2) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
              for row in rows]
    lines += ["", "weight error: norm of original minus quantized over that of the original; with residual: the same with every",
              "channel compensated; output error: predicted on the calibration text, channels taken as independent."]
    return "\n".join(lines)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}"


def _ratio(part: float, whole: float) -> str:
    return f"{sqrt(part / whole):.2%}" if whole else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="folder made by quantize.py")
    parser.add_argument("--card", action="store_true", help="also write it into the folder's README.md, the model card")
    parser.add_argument("--results", metavar="FILE", help="with --card: perplexity rows, for those of this folder")
    args = parser.parse_args()
    if args.results and not args.card:
        raise UserError("results: expected with --card, into which their rows go")
    table = describe(args.folder)
    print(table)
    if args.card:
        quant = read_quant_config(args.folder)
        rows = [row for row in read_rows(args.results) if row.get("weights_hash") == quant.weights_hash and "perplexity" in row] \
            if args.results else []
        with atomic(Path(args.folder) / "README.md") as temporary:
            temporary.write_text(card(Path(args.folder).resolve().name, quant, table, rows), encoding="utf-8")


if __name__ == "__main__":
    run(main)
