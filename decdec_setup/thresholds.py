"""Writes what calibration text shows of every linear layer's input: thresholds.pt.

For each rank the largest value that the rank-th largest |x| of a token took, from which the bucket boundaries of any k_chunk
follow, and the mean of x^2 per channel, the static ranking; what predicts errors: the energy of each residual row and of the
layer's output. Taken from the original model; for AWQ from the scaled one, whose
layers see ``x / input_scale``.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from decdec.artifacts import STATISTICS, THRESHOLDS, Thresholds, load_thresholds, read_quant_config, save_thresholds
from decdec.errors import UserError, run
from decdec.original import save_original_thresholds
from decdec.text import calibration_identity, load_text

from base_model import BaseModel
from blocks import BlockRunner, block_linears
from calibrated import by_block, is_made
from folder import original_folder
from groups import find_groups
from parts import Parts
from quantized_blocks import QuantizedBlocks
from scaling import scaled_state

LAYOUTS = ("decdec", "original")


class _Seen:
    """Running statistics of one input: ``largest`` by rank and the sum of squares, both ``(d_in,)``."""

    def __init__(self, input_scale: Tensor | None):
        self.input_scale = input_scale
        self.largest = self.squares = None
        self.tokens = 0

    def see(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2)
        if self.input_scale is not None:
            x = x / self.input_scale
        ranked = _sorted(x.abs()).amax(0).flip(0)
        squares = x.square().sum(0)
        self.largest = ranked if self.largest is None else torch.maximum(self.largest, ranked)
        self.squares = squares if self.squares is None else self.squares + squares
        self.tokens += len(x)


def _sorted(x: Tensor) -> Tensor:
    """Rows of ``x`` ascending. On a CPU by numpy, whose vectorised sort takes a tenth of torch's time, which sorts indices too."""
    if x.device.type != "cpu":
        return torch.sort(x, dim=1).values
    x.numpy().sort(axis=1)
    return x


@torch.no_grad()
def statistics(runner: BlockRunner, scaling: dict[str, Tensor], quantized: QuantizedBlocks,
               todo: set[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield ``(block, {"LAYER.STATISTIC": tensor})`` for the blocks in ``todo``, first block first: the fields of Thresholds."""
    hidden = runner.embed()
    for index in tqdm(range(max(todo) + 1), desc="thresholds", unit="block"):
        block = runner.copy_block(index)
        if index not in todo:
            hidden = runner.advance(index, block, hidden)
            continue
        linears = block_linears(runner, index, block)
        outputs = {name: [] for name in linears}
        watched, hooks = [], []
        for group in find_groups(runner, index, block, hidden[0]):
            name, module = group.first
            scale = scaling.get(f"{name}.input_scale")
            seen = _Seen(None if scale is None else scale.to(module.weight.device))
            hooks.append(module.register_forward_pre_hook(lambda _, args, seen=seen: seen.see(args[0])))
            watched.append((group, seen))
        for name, module in linears.items():
            hooks.append(module.register_forward_hook(lambda module, _, output, energies=outputs[name]:
                                                      energies.append(_energy(output, module.bias))))
        hidden = runner.advance(index, block, hidden)
        for hook in hooks:
            hook.remove()
        found: dict[str, Tensor] = {}
        for group, seen in watched:
            for name, module in group.linears.items():
                energy = torch.stack(outputs[name]).sum(0) / seen.tokens
                rows = scaling.get(f"{name}.output_scale")
                if rows is not None:
                    energy *= rows.to(energy.device).square()
                original = scaled_state(f"{name}.weight", module.weight, scaling)
                residual = original - quantized.weight(name, original.shape, original.device)
                found |= {f"{name}.largest": seen.largest.cpu(), f"{name}.mean_square": (seen.squares / seen.tokens).cpu(),
                          f"{name}.output_energy": energy.sum().cpu(), f"{name}.row_energy": residual.square().sum(0).cpu()}
        # Layers that share an input share tensors, which a file does not hold.
        yield index, {name: tensor.clone() for name, tensor in found.items()}


def _energy(output: Tensor, bias: Tensor | None) -> Tensor:
    """Sum over tokens of each output's square, without the bias: ``(d_out,)``."""
    return (output if bias is None else output - bias).flatten(0, -2).square().sum(0)


def make_thresholds(folder: str | Path, model: str | None = None, text: str = "c4", samples: int = 100, length: int = 512,
                    seed: int = 0, layout: str = "decdec", out: str | Path | None = None, device: str = "cpu") -> Path | None:
    """Write the thresholds of a folder made by quantize.py; returns their path, None if they were there already."""
    if layout not in LAYOUTS:
        raise UserError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    folder = Path(folder)
    quant = read_quant_config(folder)
    out = Path(out) if out else folder / (THRESHOLDS if layout == "decdec" else f"original/{THRESHOLDS}")
    documents = load_text(text, "calibration")
    calibration = {"text": documents.name, "text_hash": documents.hash, "samples": samples, "length": length, "seed": seed}
    parts = Parts.beside(out, {"weights": quant.weights_hash, "calibration": calibration_identity(calibration)})
    if layout == "decdec" and is_made(out, load_thresholds, quant, calibration):
        parts.clear()  # where a kill came just before
        return None
    base = BaseModel(original_folder(folder, quant, model))
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in STATISTICS}
    for name, tensor in by_block(folder, base, documents, calibration, device, parts, statistics).items():
        layer, _, kind = name.rpartition(".")
        found[kind][layer] = tensor
    if layout == "original":
        save_original_thresholds(out, found["largest"], base.prefix)
    else:
        save_thresholds(out, Thresholds(calibration, **found), quant)
    parts.clear()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="folder made by quantize.py")
    parser.add_argument("--model", help="original model, if it is no longer where quantize.py found it")
    parser.add_argument("--text", default="c4", help="calibration text: c4, pileval, wikitext, pydoc or a file (default %(default)s)")
    parser.add_argument("--samples", type=int, default=100, help="calibration samples (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens a sample (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the samples (default %(default)s)")
    parser.add_argument("--layout", default="decdec", help="decdec, or original: the paper's artifact's (default %(default)s)")
    parser.add_argument("--out", metavar="FILE", help=f"file to write; default {THRESHOLDS} in FOLDER (original/{THRESHOLDS} in "
                                                      "the original's layout)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where the block at work is held (default %(default)s)")
    args = parser.parse_args()
    wrote = make_thresholds(args.folder, args.model, args.text, args.samples, args.length, args.seed, args.layout, args.out,
                            args.device)
    print(json.dumps({"wrote": str(wrote), "bytes": wrote.stat().st_size}) if wrote else
          f"{args.out or args.folder} already holds these thresholds; nothing to do")


if __name__ == "__main__":
    run(main)
