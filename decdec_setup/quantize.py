"""Quantizes the linear layers of a model's decoder to 2, 3 or 4 bits and writes them as a model folder.

squeezellm: a codebook per output channel, by k-means weighted with the Fisher information of calibration text.
awq: group-wise uniform, after activation-aware scaling and clipping. rtn: group-wise round-to-nearest, no calibration.
Run again after an interrupt, it goes on with the first block that is not done; run again when done, it returns at once.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from decdec.artifacts import QuantConfig
from decdec.errors import UserError, run
from decdec.models import decoder_blocks, decoder_linears, load_model, load_tokenizer
from decdec.packing import BASE_BITS
from decdec.text import calibration_samples, load_text

import awq
import squeezellm
from blocks import BlockRunner
from folder import QuantizedFolder, local_folder, model_identity, summary
from uniform import check_group_size, default_group_size, pack_uniform

METHODS = ("squeezellm", "awq", "rtn")


def quantize(source: str, method: str, bits: int, out: str, group_size: int | None = None, text: str = "c4", samples: int = 100,
             length: int = 512, seed: int = 0, device: str = "cpu") -> bool:
    """Write the quantized folder ``out``; False if it already holds the same quantization."""
    if method not in METHODS:
        raise UserError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if bits not in BASE_BITS:
        raise UserError(f"bits: expected one of {BASE_BITS}, got {bits}")
    if method == "squeezellm" and group_size is not None:
        raise UserError(f"group-size: expected none for squeezellm, whose codebooks serve whole channels, got {group_size}")
    for name, value in (("samples", samples), ("length", length)):
        if value < (2 if name == "length" else 1):
            raise UserError(f"{name}: expected a positive number of {'tokens' if name == 'length' else 'samples'}, got {value}")
    base = local_folder(source)
    calibration: dict = {}
    if method != "rtn":
        documents = load_text(text, "calibration")
        calibration = {"text": documents.name, "text_hash": documents.hash, "samples": samples, "length": length, "seed": seed}
    folder = QuantizedFolder(out, {"method": method, "bits": bits, "group_size": group_size, "calibration": calibration,
                                   "model": model_identity(base)})
    if folder.finished():
        return False

    model = load_model(str(base))
    widths = sorted({module.in_features for module in decoder_linears(model).values()})
    if method != "squeezellm":
        group_size = group_size or default_group_size(widths)
        check_group_size(group_size, widths)
    count = len(decoder_blocks(model)[1])
    todo = {index for index in range(count) if not folder.has_part(index)}
    if todo and method == "rtn":
        parts = _rtn_blocks(model, bits, group_size, todo)
    elif todo:
        tokens = calibration_samples(documents, load_tokenizer(str(base)), samples, length, seed)
        runner = BlockRunner(model, tokens, device)
        parts = squeezellm.quantize_blocks(runner, bits, todo) if method == "squeezellm" \
            else awq.quantize_blocks(runner, bits, group_size, todo)
    else:
        parts = iter(())
    for index, tensors in parts:
        folder.save_part(index, tensors)

    named = os.path.relpath(base, out) if Path(source).is_dir() else source
    folder.finish(load_model(str(base)), base, count, QuantConfig(
        method=method, format="codebook" if method == "squeezellm" else "uniform", bits=bits, group_size=group_size,
        base_model=named, weights_hash="", calibration=calibration))
    return True


def _rtn_blocks(model: nn.Module, bits: int, group_size: int, todo: set[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    prefix, blocks = decoder_blocks(model)
    for index in tqdm(sorted(todo), desc="RTN", unit="block"):
        linears = {name: module for name, module in blocks[index].named_modules() if isinstance(module, nn.Linear)}
        tensors: dict[str, Tensor] = {}
        for name, module in linears.items():
            tensors |= pack_uniform(f"{prefix}.{index}.{name}", module.weight.detach(), bits, group_size)
        yield index, tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="original model: a Hugging Face folder or a hub id")
    parser.add_argument("--method", required=True, help=", ".join(METHODS))
    parser.add_argument("--bits", type=int, required=True, help="2, 3 or 4")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="model folder to write")
    parser.add_argument("--group-size", type=int, help="inputs that share a scale (awq, rtn); default the largest divisor "
                                                       "of 128 that divides every layer's inputs")
    parser.add_argument("--text", default="c4", help="calibration text: c4, wikitext, pydoc or a file (default %(default)s)")
    parser.add_argument("--samples", type=int, default=100, help="calibration samples (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens a sample (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the samples (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where the block at work is held (default %(default)s)")
    args = parser.parse_args()
    written = quantize(args.model, args.method, args.bits, args.out, args.group_size, args.text, args.samples, args.length,
                       args.seed, args.device)
    print(summary(Path(args.out)) if written else f"{args.out} already holds this quantization; nothing to do")


if __name__ == "__main__":
    run(main)
