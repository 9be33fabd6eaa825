"""Writes the static repair of a quantized model: repair.pt, for layers where it pays (decdec/repair.py says what it is).

A repair is fitted to the error that compensation with --k-chunk channels leaves, since what is fetched needs no repair.
Calibration text is cut into samples to fit on and samples held out. A layer gets the repair of low rank, and the layers of one
input are centred, only where that lowers the error left on the held-out samples by a twentieth or more. The error of a token
counts relative to what quantization does to it, so that attention sinks, whose inputs are a hundred times larger, count as the
single tokens they are; the fit leaves the first position, on which they mostly stand, out. The residuals of what the repair
leaves are then written by cheatsheet.py --repaired.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from decdec.artifacts import REPAIR, Repair, load_repair, read_quant_config, save_repair
from decdec.errors import UserError, run
from decdec.reference import CHUNK, chunk_counts
from decdec.repair import LayerRepair, flatten, unflatten
from decdec.text import calibration_identity, load_text

from base_model import BaseModel
from blocks import BlockRunner
from calibrated import by_block, is_made
from folder import original_folder
from groups import Group, find_groups
from parts import Parts
from quantized_blocks import QuantizedBlocks
from scaling import scaled_state

CENTER = ("auto", "on", "off")
HELD_OUT = 4  # one sample in so many is held out
LEAST = 0.05  # share of the held-out error that a repair must remove; less is not worth its product in every step
_OVERSAMPLED, _ROUNDS = 8, 6  # of the randomised range finder


@dataclass(frozen=True)
class Settings:
    """``rank`` of the low-rank repair, 0 for none; whether layers are centred; ``k_chunk`` whose remaining error counts."""

    rank: int = 8
    center: str = "auto"
    k_chunk: int = 16

    def __post_init__(self):
        if self.rank < 0:
            raise UserError(f"rank: expected 0 or more, got {self.rank}")
        if self.center not in CENTER:
            raise UserError(f"center: expected one of {', '.join(CENTER)}, got {self.center!r}")
        if not 0 <= self.k_chunk <= CHUNK:
            raise UserError(f"k_chunk: expected 0..{CHUNK}, got {self.k_chunk}")
        if self.rank == 0 and self.center == "off":
            raise UserError("rank: expected 1 or more where nothing is centred, got 0")


def unchosen(x: Tensor, k_chunk: int) -> Tensor:
    """``x`` ``(n, d_in)`` without the ``k_chunk`` channels of each chunk that exact selection takes."""
    rest = x.clone()
    for part, count in zip(rest.split(CHUNK, dim=1), chunk_counts(x.shape[1], k_chunk)):
        part.scatter_(1, part.abs().topk(count, dim=1).indices, 0)
    return rest


def low_rank(residual: Tensor, fit: Tensor, rank: int, mean: Tensor | None = None, k_chunk: int = 0) -> LayerRepair:
    """The repair of ``residual`` ``(d_out, d_in)`` of least squared output error, over inputs ``fit`` ``(n, d_in)`` less ``mean``
    and their ``k_chunk`` chosen channels: the projection on the first ``rank`` principal directions of that error, in float16 as
    it is stored.

    Being a projection it raises the error of no token at any k_chunk. The rank is at most what shapes and tokens allow.
    """
    rank = min(rank, *residual.shape, len(fit))
    error = residual @ unchosen(fit if mean is None else fit - mean, k_chunk).t()
    torch.manual_seed(0)
    directions = torch.svd_lowrank(error, min(rank + _OVERSAMPLED, *error.shape), _ROUNDS)[0][:, :rank] if rank else error[:, :0]
    up, down = directions.half(), (directions.t() @ residual).half()
    constant = None if mean is None else ((residual - up.float() @ down.float()) @ mean).half()
    return LayerRepair(down, up, mean, constant)


def error_left(residual: Tensor, repair: LayerRepair | None, held_out: Tensor, k_chunk: int) -> float:
    """What is left of the output error of ``residual`` with ``repair`` and ``k_chunk`` channels, exactly chosen and fetched, as a
    share of the token's whole error: squared, mean over the tokens ``held_out`` ``(n, d_in)``."""
    whole = (held_out @ residual.t()).square().sum(1)
    left, shifted = residual, held_out
    if repair is not None:
        exact = repair.to(residual.device, torch.float32)
        left = residual - exact.up @ exact.down
        shifted = held_out if repair.mean is None else held_out - exact.near(held_out) * exact.mean
    error = (unchosen(shifted, k_chunk) @ left.t()).square().sum(1)
    return float((error / whole.clamp_min(torch.finfo(torch.float32).tiny)).mean())


def repair_group(residuals: dict[str, Tensor], fit: Tensor, held_out: Tensor, settings: Settings) -> dict[str, LayerRepair]:
    """The repairs of layers that share an input, of those that get one; ``residuals`` are float32 ``(d_out, d_in)``."""
    plain = {name: error_left(residual, None, held_out, settings.k_chunk) for name, residual in residuals.items()}

    def best(mean: Tensor | None) -> tuple[dict[str, LayerRepair], dict[str, float]]:
        """For every layer the better of a repair with and without the low rank, and what error it leaves."""
        found, errors = {}, dict(plain)
        for name, residual in residuals.items():
            if mean is not None:
                found[name] = low_rank(residual, fit, 0, mean, settings.k_chunk)
                errors[name] = error_left(residual, found[name], held_out, settings.k_chunk)
            if settings.rank:
                tried = low_rank(residual, fit, settings.rank, mean, settings.k_chunk)
                error = error_left(residual, tried, held_out, settings.k_chunk)
                if error <= (1 - LEAST) * errors[name]:
                    found[name], errors[name] = tried, error
        return found, errors

    if settings.center == "on":
        return best(fit.mean(0))[0]
    without, errors = best(None)
    if settings.center == "auto":
        centred, lower = best(fit.mean(0))
        if sum(lower[name] / errors[name] for name in residuals if errors[name]) <= (1 - LEAST) * len(residuals):
            return centred
    return without


@torch.no_grad()
def repairs(settings: Settings, runner: BlockRunner, scaling: dict[str, Tensor], quantized: QuantizedBlocks,
            todo: set[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield ``(block, {"LAYER.PART": tensor})`` for the blocks in ``todo``, first block first: the parts of their repairs."""
    hidden = runner.embed()
    for index in tqdm(range(max(todo) + 1), desc="repair", unit="block"):
        block = runner.copy_block(index)
        if index not in todo:
            hidden = runner.advance(index, block, hidden)
            continue
        groups = find_groups(runner, index, block, hidden[0])
        inputs: list[list[Tensor]] = [[] for _ in groups]
        hooks = [group.first[1].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach().flatten(0, -2)))
                 for group, seen in zip(groups, inputs)]
        hidden = runner.advance(index, block, hidden)
        for hook in hooks:
            hook.remove()
        found: dict[str, LayerRepair] = {}
        for group, seen in zip(groups, inputs):
            found |= _of_group(group, seen, scaling, quantized, settings)
        # Layers that share an input share a mean, which a file does not hold.
        yield index, {name: tensor.cpu().clone() for name, tensor in flatten(found).items()}


def _of_group(group: Group, seen: list[Tensor], scaling: dict[str, Tensor], quantized: QuantizedBlocks,
              settings: Settings) -> dict[str, LayerRepair]:
    """The repairs of one group, whose input over each sample is in ``seen``, ``(length, d_in)``."""
    name, module = group.first
    scale = scaling.get(f"{name}.input_scale")
    if scale is not None:
        seen = [x / scale.to(x.device) for x in seen]
    residuals = {}
    for name, module in group.linears.items():
        if name not in quantized.quant.dense:
            original = scaled_state(f"{name}.weight", module.weight, scaling)
            residuals[name] = original - quantized.weight(name, original.shape, original.device)
    held_out = seen[::HELD_OUT]
    fit = [x[1:] for number, x in enumerate(seen) if number % HELD_OUT]
    return repair_group(residuals, torch.cat(fit), torch.cat(held_out), settings) if residuals else {}


def make_repair(folder: str | Path, settings: Settings = Settings(), model: str | None = None, text: str = "c4",
                samples: int = 16, length: int = 512, seed: int = 0, device: str = "cpu") -> Path | None:
    """Write the static repair of a folder made by quantize.py; returns its path, None if it was there already."""
    folder = Path(folder)
    quant = read_quant_config(folder)
    if samples < HELD_OUT:
        raise UserError(f"samples: expected {HELD_OUT} or more, of which one in {HELD_OUT} is held out, got {samples}")
    documents = load_text(text, "calibration")
    calibration = asdict(settings) | {"text": documents.name, "text_hash": documents.hash, "samples": samples, "length": length,
                                      "seed": seed}
    out = folder / REPAIR
    parts = Parts.beside(out, {"weights": quant.weights_hash, "calibration": calibration_identity(calibration)})
    if is_made(out, load_repair, quant, calibration):
        parts.clear()  # where a kill came just before
        return None
    base = BaseModel(original_folder(folder, quant, model))
    found = by_block(folder, base, documents, calibration, device, parts, partial(repairs, settings))
    save_repair(out, Repair(calibration, unflatten(found)), quant)
    parts.clear()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="folder made by quantize.py")
    parser.add_argument("--model", help="original model, if it is no longer where quantize.py found it")
    parser.add_argument("--rank", type=int, default=8, help="of the low-rank repair; 0 for centring alone (default %(default)s)")
    parser.add_argument("--center", default="auto", choices=CENTER,
                        help="center every layer, none, or those where it pays (default %(default)s)")
    parser.add_argument("--k-chunk", type=int, default=16, metavar="K",
                        help="channels a chunk whose compensation leaves the error that is repaired (default %(default)s)")
    parser.add_argument("--text", default="c4",
                        help="calibration text: c4, pileval, wikitext, pydoc or a file (default %(default)s)")
    parser.add_argument("--samples", type=int, default=16,
                        help=f"calibration samples, one in {HELD_OUT} held out (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens a sample (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the samples (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where the block at work is held (default %(default)s)")
    args = parser.parse_args()
    settings = Settings(args.rank, args.center, args.k_chunk)
    wrote = make_repair(args.folder, settings, args.model, args.text, args.samples, args.length, args.seed, args.device)
    if wrote is None:
        print(f"{args.folder} already holds this repair; nothing to do")
        return
    layers = load_repair(wrote, read_quant_config(args.folder)).layers.values()
    print(json.dumps({"wrote": str(wrote), "bytes": wrote.stat().st_size, "layers": len(layers),
                      "low_rank": sum(len(layer.down) > 0 for layer in layers),
                      "centred": sum(layer.mean is not None for layer in layers)}))


if __name__ == "__main__":
    run(main)
