"""Quantizes the linear layers of a model's decoder to 2, 3 or 4 bits and writes them as a model folder.

squeezellm: a codebook per output channel, by k-means weighted with the Fisher information of calibration text.
awq: group-wise uniform, after activation-aware scaling and clipping. gptq: group-wise uniform, channel by channel, later
channels making good the error of earlier ones. rtn: group-wise round-to-nearest, no calibration.
3.5 bits: some blocks at 3 and some at 4, as the map says that mixed_precision.py writes.
Run again after an interrupt, it goes on with the first block that is not done; run again when done, it returns at once.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from decdec.artifacts import QuantConfig
from decdec.errors import UserError, run
from decdec.models import block_of, load_tokenizer, local_folder, original_hash
from decdec.packing import BASE_BITS
from decdec.text import calibration_identity, calibration_samples, load_text

import awq
import gptq
import squeezellm
from base_model import BaseModel
from bit_map import read_bit_map
from blocks import BlockRunner
from folder import QuantizedFolder, Reusable, dated_identity, model_identity, summary
from uniform import check_group_size, default_group_size, pack_uniform

METHODS = ("squeezellm", "awq", "gptq", "rtn")


def quantize(source: str, method: str, bits: float, out: str, group_size: int | None = None, text: str = "c4", samples: int = 100,
             length: int = 512, seed: int = 0, device: str = "cpu", bit_map: str | None = None, reuse: Sequence[str] = (),
             act_order: bool | None = None) -> bool:
    """Write the quantized folder ``out``; False if it already holds the same quantization.

    ``act_order`` is gptq's, and its default.
    """
    if method not in METHODS:
        raise UserError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if bit_map is None and bits not in BASE_BITS:
        raise UserError(f"bits: expected one of {BASE_BITS}, got {bits:g}" + (" without a bit-map" if bits % 1 == 0.5 else ""))
    if method == "squeezellm" and group_size is not None:
        raise UserError(f"group-size: expected none for squeezellm, whose codebooks serve whole channels, got {group_size}")
    if act_order is not None and method != "gptq":
        raise UserError(f"act-order: expected method gptq, got {method}")
    if reuse and method == "gptq":
        raise UserError("reuse: expected another method than gptq, whose blocks depend on the bits of those before them")
    source_folder = local_folder(source)
    calibration: dict = {"original": original_hash(source_folder)}
    if method != "rtn":
        documents = load_text(text, "calibration")
        calibration |= {"text": documents.name, "text_hash": documents.hash, "samples": samples, "length": length, "seed": seed}
    identity = {"method": method, "bits": bits, "group_size": group_size, "calibration": calibration_identity(calibration),
                "model": model_identity(source_folder)}
    if bit_map is not None:
        identity["block_bits"] = read_bit_map(bit_map, bits)
    if method == "gptq":
        act_order = identity["act_order"] = act_order is not False
    dated = {key: value for key, value in calibration.items() if key != "original"}
    folder = QuantizedFolder(out, identity, identity | {"calibration": dated, "model": dated_identity(source_folder)})
    if folder.finished():
        return False

    base = BaseModel(source_folder)
    widths = sorted({module.in_features for module in base.linears().values()})
    if method != "squeezellm":
        group_size = default_group_size(widths) if group_size is None else group_size
        check_group_size(group_size, widths)
    count = len(base.blocks)
    block_bits = identity.get("block_bits", [bits] * count)
    if len(block_bits) != count:
        raise UserError(f"bit-map: {bit_map} is of a model of {len(block_bits)} blocks, this one has {count}")
    layer_bits = {name: b for name in base.linears() if (b := block_bits[block_of(name)]) != min(block_bits)}
    config = QuantConfig(method=method, format="codebook" if method == "squeezellm" else "uniform", bits=min(block_bits),
                         group_size=group_size, weights_hash="",
                         base_model=os.path.relpath(source_folder, out) if Path(source).is_dir() else source,
                         calibration=calibration | ({} if act_order is None else {"act_order": act_order}),
                         layer_bits=layer_bits)
    for other in map(Reusable, reuse):
        for index in range(count):
            if other.serves(config, block_bits[index]) and not folder.parts.has(index):
                folder.parts.save(index, other.block(f"{base.prefix}.{index}"))

    todo = {index for index in range(count) if not folder.parts.has(index)}
    if todo and method == "rtn":
        parts = _rtn_blocks(base, block_bits, group_size, todo)
    elif todo:
        tokens = calibration_samples(documents, load_tokenizer(str(source_folder)), samples, length, seed)
        runner = BlockRunner(base.model, tokens, device, base.block)
        if method == "squeezellm":
            parts = squeezellm.quantize_blocks(runner, block_bits, todo)
        elif method == "awq":
            parts = awq.quantize_blocks(runner, block_bits, group_size, todo)
        else:
            parts = gptq.quantize_blocks(runner, block_bits, group_size, todo, folder.parts.load, act_order)
    else:
        parts = iter(())
    for index, tensors in parts:
        folder.parts.save(index, tensors)
    folder.finish(base, config)
    return True


def _rtn_blocks(base: BaseModel, bits: Sequence[int], group_size: int, todo: set[int]) -> Iterator[tuple[int, dict]]:
    for index in tqdm(sorted(todo), desc="RTN", unit="block"):
        tensors = {}
        for name in base.linears():
            if block_of(name) == index:
                tensors |= pack_uniform(name, base.tensor(f"{name}.weight").float(), bits[index], group_size)
        yield index, tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="original model: a Hugging Face folder or a hub id")
    parser.add_argument("--method", required=True, help=", ".join(METHODS))
    parser.add_argument("--bits", type=float, required=True, help="2, 3 or 4; 3.5 with --bit-map")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="model folder to write")
    parser.add_argument("--bit-map", metavar="FILE", help="the bits of each block, from mixed_precision.py")
    parser.add_argument("--reuse", nargs="+", default=[], metavar="FOLDER", help="copy blocks of the same bits and calibration "
                        "from these folders; exact, since no method but gptq lets blocks depend on each other's bits")
    parser.add_argument("--act-order", action=argparse.BooleanOptionalAction,
                        help="gptq: take the input channels by falling energy (default yes)")
    parser.add_argument("--group-size", type=int, help="inputs that share a scale (awq, gptq, rtn); default the largest divisor "
                                                       "of 128 that divides every layer's inputs")
    parser.add_argument("--text", default="c4", help="calibration text: c4, pileval, wikitext, pydoc or a file (default %(default)s)")
    parser.add_argument("--samples", type=int, default=100, help="calibration samples (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens a sample (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the samples (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where the block at work is held (default %(default)s)")
    args = parser.parse_args()
    bits = int(args.bits) if args.bits.is_integer() else args.bits
    written = quantize(args.model, args.method, bits, args.out, args.group_size, args.text, args.samples, args.length,
                       args.seed, args.device, args.bit_map, args.reuse, args.act_order)
    print(summary(Path(args.out)) if written else f"{args.out} already holds this quantization; nothing to do")


if __name__ == "__main__":
    run(main)
