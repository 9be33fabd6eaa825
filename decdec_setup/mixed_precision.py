"""Chooses the blocks of a 3.5-bit model that get 4 bits, and writes the map that quantize.py --bit-map takes.

A block's score is how much further the model's output is from the original's, as a Kullback-Leibler divergence per token, with
this one block at the low bits than with it at the high bits, all others being the original's. The upper half by score gets the
high bits. Takes the two finished folders of one bit width each.
"""

import argparse
import json

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
from folder import local_folder
from quantized_blocks import QuantizedBlocks


@torch.no_grad()
def divergences(runner: BlockRunner, folders: list[QuantizedBlocks]) -> Tensor:
    """Nats per token, float64 ``(blocks, len(folders))``, from the original to the model with one block of one folder.

    All variants go through the blocks together, so each block of the original is at work once.
    """
    clean = runner.embed()
    variants: dict[tuple[int, int], list[Tensor]] = {}
    for index in tqdm(range(len(runner.blocks)), desc="blocks", unit="block"):
        block = runner.copy_block(index)
        for key, states in variants.items():
            variants[key] = runner.advance(index, block, states)
        for which, folder in enumerate(folders):
            changed = folder.load_into(runner.copy_block(index), f"{runner.prefix}.{index}")
            variants[index, which] = runner.advance(index, changed, clean)
        clean = runner.advance(index, block, clean)
    wanted = [runner.logits(state, sample).float().log_softmax(-1) for state, sample in zip(clean, runner.samples)]
    found = torch.zeros(len(runner.blocks), len(folders), dtype=torch.float64)
    for (index, which), states in tqdm(variants.items(), desc="outputs", unit="variant"):
        for state, sample, target in zip(states, runner.samples, wanted):
            logits = runner.logits(state, sample).float().log_softmax(-1)
            found[index, which] += float(F.kl_div(logits, target, log_target=True, reduction="batchmean")) / len(wanted)
    return found


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
           "calibration": {"text": documents.name, "text_hash": documents.hash, "samples": samples, "length": length, "seed": seed}}
    if known := known_bit_map(out, how):
        return known
    base = BaseModel(local_folder(source))
    tokens = calibration_samples(documents, load_tokenizer(str(base.folder)), samples, length, seed)
    found = divergences(BlockRunner(base.model, tokens, device, base.block), folders)
    chosen = choose(found, *bits)
    write_bit_map(out, chosen, how | {"divergence": {str(b): column.tolist() for b, column in zip(bits, found.t())}})
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
