"""Perplexity in the paper's convention, for an original model or a DecDEC folder at several k_chunk.

The text is joined and cut into non-overlapping windows, the tail dropped; perplexity is exp of the mean loss over all predicted
tokens; every position is compensated on its own channels, as if it were a decoding step (paper, section 5.1). One JSON line a
setting is appended to --out; a setting whose line is there already is not run again.
"""

import argparse
import math
import platform
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import decdec
from decdec import artifacts, hub, models, text
from decdec.errors import UserError, run
from decdec.files import append_row, read_json, read_rows
from decdec.linear import Compensation

SELECTIONS = ("bucket", "exact", "static", "random")
# What makes two rows the same measurement.
KEY = ("model", "weights_hash", "method", "bits", "selection", "k_chunk", "residual_bits", "nested", "text_hash", "windows",
       "window_length", "dtype", "seed")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="DecDEC folder, or an original model's folder or hub id")
    parser.add_argument("--k-chunk", type=int, nargs="+", default=[0], metavar="K", help="channels a chunk, 0..1024 (default 0)")
    parser.add_argument("--selection", nargs="+", default=["bucket"], choices=SELECTIONS,
                        help="how channels are chosen (default bucket, the paper's)")
    parser.add_argument("--cheatsheet", help="another residual file than the folder's cheatsheet.pt")
    parser.add_argument("--text", default="wikitext", help="wikitext, c4, pydoc or a file (default wikitext)")
    parser.add_argument("--windows", type=int, help="number of windows (default all)")
    parser.add_argument("--length", type=int, help="tokens a window (default 2048, or the model's context if shorter)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of the random selection")
    parser.add_argument("--out", default="evaluation/results/perplexity.jsonl", help="JSON-lines file the rows go to")
    arguments = parser.parse_args()
    for k_chunk in arguments.k_chunk:
        if not 0 <= k_chunk <= 1024:
            raise UserError(f"--k-chunk: expected 0..1024, got {k_chunk}")
    for name in ("windows", "length"):
        value = getattr(arguments, name)
        if value is not None and value < (2 if name == "length" else 1):
            raise UserError(f"--{name}: expected a positive number, got {value}")
    return arguments


@torch.inference_mode()
def perplexity(model: torch.nn.Module, ids: Tensor, label: str) -> tuple[float, float]:
    """Perplexity over windows ``ids`` (int64 ``(windows, length)``), and the standard error of the mean loss over windows."""
    losses = []
    for window in tqdm(ids, desc=label, leave=False):
        logits = model(window[None].to(model.device), use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), window[1:].to(model.device)).double().cpu())
    losses = torch.stack(losses)
    error = float(losses.std() / math.sqrt(len(losses))) if len(losses) > 1 else 0.0
    return math.exp(float(losses.mean())), error


def settings(arguments: argparse.Namespace, compensated: bool) -> list[tuple[str, int]]:
    """(selection, k_chunk) pairs to measure; k_chunk 0 is the same for every selection and measured once."""
    if not compensated:
        if any(arguments.k_chunk):
            raise UserError(f"--k-chunk: {arguments.model} is not a DecDEC folder, only 0 can be measured")
        return [("none", 0)]
    base = [("none", 0)] if 0 in arguments.k_chunk else []
    return base + [(selection, k) for selection in arguments.selection for k in arguments.k_chunk if k]


def describe(arguments: argparse.Namespace, quant: artifacts.QuantConfig | None) -> dict:
    """The part of a row that all settings of this run share."""
    row = {"bench": "perplexity", "model": Path(arguments.model).name}
    if quant is None:
        row |= {"method": "original", "bits": 16, "group_size": None, "weights_hash": None}
    else:
        bits = sorted({quant.bits, *quant.layer_bits.values()})
        row |= {"model": quant.base_model, "method": quant.method, "bits": quant.bits if len(bits) == 1 else bits,
                "group_size": quant.group_size, "weights_hash": quant.weights_hash}
    return row | {"dtype": arguments.dtype, "seed": arguments.seed, "device": device_name(arguments.device),
                  "torch": torch.__version__, "decdec": decdec.__version__}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"cpu {platform.machine()}"


def main() -> None:
    arguments = parse_arguments()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device: no GPU is visible to torch; use cpu")
    models.check_source(arguments.model)
    is_folder = Path(arguments.model).is_dir()
    quantized = is_folder and "quantization_config" in read_json(Path(arguments.model) / "config.json")
    quant = artifacts.read_quant_config(arguments.model) if quantized else None

    tokenizer = models.load_tokenizer(arguments.model)
    dtype = getattr(torch, arguments.dtype)
    model = None
    evaluation = text.load_text(arguments.text, "evaluation")
    length = arguments.length or min(2048, models.context_length(arguments.model))
    ids = text.windows(evaluation, tokenizer, length, arguments.windows)
    shared = describe(arguments, quant) | {"text": evaluation.name, "text_hash": evaluation.hash, "windows": len(ids),
                                           "window_length": length}
    done = {tuple(str(row.get(key)) for key in KEY): row for row in read_rows(arguments.out)}
    residual_bits, nested = None, None
    if quant is not None and any(arguments.k_chunk):
        sheet = artifacts.load_cheatsheet(arguments.cheatsheet or Path(arguments.model) / artifacts.CHEATSHEET, quant)
        residual_bits, nested = sheet.bits, sheet.nested

    for selection, k_chunk in settings(arguments, quant is not None):
        row = shared | {"selection": selection, "k_chunk": k_chunk, "residual_bits": residual_bits if k_chunk else None,
                        "nested": nested if k_chunk else None,
                        "compensated": "every position" if k_chunk else "none"}
        label = f"{row['method']} {row['bits']} bits, {selection}, k_chunk {k_chunk}"
        known = done.get(tuple(str(row.get(key)) for key in KEY))
        if known is None:
            start = time.monotonic()
            if model is None:
                model = load(arguments, quant, dtype)
            if quant is not None:
                setting = Compensation(k_chunk=k_chunk, selection=selection if k_chunk else "bucket", prefill=True,
                                       seed=arguments.seed)
                hub.set_compensation(model, setting)
            value, error = perplexity(model, ids, label)
            known = row | {"perplexity": round(value, 4), "loss_standard_error": round(error, 5), **hub.memory(model),
                           "seconds": round(time.monotonic() - start, 1)}
            append_row(arguments.out, known)
        print(f"{label}: perplexity {known['perplexity']:.3f}")
    print(f"rows are in {arguments.out}")


def load(arguments: argparse.Namespace, quant: artifacts.QuantConfig | None, dtype: torch.dtype) -> torch.nn.Module:
    if quant is None:
        return models.load_model(arguments.model, dtype).to(arguments.device)
    first = Compensation(k_chunk=max(arguments.k_chunk), prefill=True)
    return hub.load(arguments.model, dtype=dtype, compensation=first, cheatsheet=arguments.cheatsheet).to(arguments.device)


if __name__ == "__main__":
    run(main)
