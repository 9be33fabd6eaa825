"""Chooses the blocks of a 3.5-bit model that get 4 bits, and writes the map that quantize.py --bit-map takes.

A block's score is how much further the model's output is from the original's, as a Kullback-Leibler divergence per token, with
this one block at the low bits than with it at the high bits, all others being the original's. The upper half by score gets the
high bits. Takes the two finished folders of one bit width each. Run again after an interrupt, it goes on where it last saved.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from decdec.errors import UserError, run
from decdec.models import load_tokenizer
from decdec.text import calibration_samples, load_text

from base_model import BaseModel
from bit_map import known_bit_map, write_bit_map
from blocks import BlockRunner
from folder import model_identity, original_folder
from parts import Parts
from quantized_blocks import QuantizedBlocks

SAVE_SECONDS = 20  # from one save to the next: the states of all variants are saved together, at the end 5 GB of a 70B model


@torch.no_grad()
def divergences(runner: BlockRunner, folders: list[QuantizedBlocks], parts: Parts) -> Tensor:
    """Nats per token, float64 ``(blocks, len(folders))``, from the original to the model with one block of one folder.

    All variants go through the blocks together, so each block of the original is at work once. ``parts`` keeps how far they are.
    """
    clean = runner.embed()
    variants: dict[tuple[int, int], list[Tensor]] = {}
    first = 0
    if parts.has(0):
        first, clean, variants = _read_states(parts.load(0))
    saved = time.monotonic()
    for index in tqdm(range(first, len(runner.blocks)), desc="blocks", unit="block", initial=first, total=len(runner.blocks)):
        block = runner.copy_block(index)
        for key, states in variants.items():
            variants[key] = runner.advance(index, block, states)
        for which, folder in enumerate(folders):
            changed = folder.load_into(runner.copy_block(index), f"{runner.prefix}.{index}")
            variants[index, which] = runner.advance(index, changed, clean)
        clean = runner.advance(index, block, clean)
        if time.monotonic() - saved >= SAVE_SECONDS:
            parts.save(0, _states(index + 1, clean, variants))
            saved = time.monotonic()
    wanted = [runner.logits(state, sample).float().log_softmax(-1) for state, sample in zip(clean, runner.samples)]
    found = torch.zeros(len(runner.blocks), len(folders), dtype=torch.float64)
    for (index, which), states in tqdm(variants.items(), desc="outputs", unit="variant"):
        for state, sample, target in zip(states, runner.samples, wanted):
            logits = runner.logits(state, sample).float().log_softmax(-1)
            found[index, which] += float(F.kl_div(logits, target, log_target=True, reduction="batchmean")) / len(wanted)
    return found


def _states(done: int, clean: list[Tensor], variants: dict[tuple[int, int], list[Tensor]]) -> dict[str, Tensor]:
    """What is to be saved once ``done`` blocks are: each model's states as one ``(samples, length, d_model)``."""
    return {"done": torch.tensor(done), "clean": torch.cat(clean).cpu()} | {
        f"{index}.{which}": torch.cat(states).cpu() for (index, which), states in variants.items()}


def _read_states(saved: dict[str, Tensor]) -> tuple[int, list[Tensor], dict[tuple[int, int], list[Tensor]]]:
    """The arguments of :func:`_states` that gave ``saved``, on the CPU."""
    done, clean = int(saved.pop("done")), list(saved.pop("clean").split(1))
    keys = sorted(tuple(map(int, key.split("."))) for key in saved)
    return done, clean, {(index, which): list(saved[f"{index}.{which}"].split(1)) for index, which in keys}


def choose(found: Tensor, low: int, high: int) -> list[int]:
    """The bits of every block: of ``divergences`` at (low, high) bits, the upper half by difference gets ``high``."""
    order = torch.argsort(found[:, 0] - found[:, 1], descending=True, stable=True)
    chosen = set(order[:len(found) // 2].tolist())
    return [high if index in chosen else low for index in range(len(found))]


def make_bit_map(source: str, low: str, high: str, out: str, text: str = "c4", samples: int = 8, length: int = 256, seed: int = 0,
                 device: str = "cpu") -> list[int]:
    """Write the map to ``out`` and return it: the bits of every block. A map that rests on the same is left as it is."""
    folders = [QuantizedBlocks(folder) for folder in (low, high)]
    bits = [folder.quant.bits for folder in folders]
    if mixed := [folder.folder for folder in folders if folder.quant.layer_bits]:
        raise UserError(f"expected folders of one bit width, {mixed[0]} mixes several")
    if bits[0] >= bits[1] or folders[0].quant.method != folders[1].quant.method:
        found = " and ".join(f"{folder.quant.method} at {b} bits" for folder, b in zip(folders, bits))
        raise UserError(f"expected folders of one method, the lower bits first, got {found}")
    documents = load_text(text, "calibration")
    how = {"method": folders[0].quant.method, "weights_hashes": [folder.quant.weights_hash for folder in folders],
           "calibration": {"text_hash": documents.hash, "samples": samples, "length": length, "seed": seed}}
    source_folder, _ = (original_folder(folder.folder, folder.quant, source) for folder in folders)
    parts = Parts.beside(Path(out), how | {"model": model_identity(source_folder)})
    if known := known_bit_map(out, how):
        parts.clear()  # where a kill came just before
        return known
    base = BaseModel(source_folder)
    tokens = calibration_samples(documents, load_tokenizer(str(base.folder)), samples, length, seed)
    found = divergences(BlockRunner(base.model, tokens, device, base.block), folders, parts)
    chosen = choose(found, *bits)
    by_bits = {str(width): column.tolist() for width, column in zip(bits, found.t())}
    write_bit_map(out, chosen, how | {"text": documents.name, "divergence": by_bits})
    parts.clear()
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="original model: a Hugging Face folder or a hub id")
    parser.add_argument("low", metavar="FOLDER_W3", help="its folder at the lower bits")
    parser.add_argument("high", metavar="FOLDER_W4", help="its folder at the higher bits, by the same method")
    parser.add_argument("--out", required=True, metavar="FILE", help="map to write (JSON)")
    parser.add_argument("--text", default="c4", help="c4, wikitext, pileval, pydoc or a file (default %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="samples (default %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens a sample (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the samples (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where the block at work is held (default %(default)s)")
    args = parser.parse_args()
    chosen = make_bit_map(args.model, args.low, args.high, args.out, args.text, args.samples, args.length, args.seed, args.device)
    print(json.dumps({"wrote": args.out, "bits": chosen, "mean": round(sum(chosen) / len(chosen), 3)}))


if __name__ == "__main__":
    run(main)
