"""Perplexity in the paper's convention, for an original model or a DecDEC folder at several k_chunk.

The text is joined and cut into non-overlapping windows, the tail dropped; perplexity is exp of the mean loss over all predicted
tokens; every position is compensated on its own channels, as if it were a decoding step (paper, section 5.1). One JSON line a
setting is appended to --out; a setting whose line is there already is not run again.
"""

import argparse
import math
import time

import torch
from subject import SUBJECT_KEY, Rows, add_arguments, add_settings, from_arguments, sequence_length
from torch import Tensor
from tqdm import tqdm

from decdec import hub, models, text
from decdec.errors import run

# What makes two rows the same measurement.
KEY = (*SUBJECT_KEY, "text_hash", "windows", "window_length")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    add_settings(parser)
    parser.add_argument("--text", default="wikitext", help="wikitext, c4, pydoc or a file (default wikitext)")
    parser.add_argument("--windows", type=int, help="number of windows (default all)")
    parser.add_argument("--length", type=int, help="tokens a window (default 2048, or the model's context if shorter)")
    parser.add_argument("--out", default="evaluation/results/perplexity.jsonl", help="JSON-lines file the rows go to")
    return parser.parse_args()


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


def main() -> None:
    arguments = parse_arguments()
    subject = from_arguments(arguments)
    evaluation = text.load_text(arguments.text, "evaluation")
    length = sequence_length(arguments)
    ids = text.windows(evaluation, models.load_tokenizer(arguments.model), length, arguments.windows)
    settings = subject.settings(arguments.selection, arguments.k_chunk)
    rows = Rows(arguments.out, KEY)
    model = None
    for setting, row in zip(settings, subject.compensated_rows("perplexity", settings), strict=True):
        row |= {"text": evaluation.name, "text_hash": evaluation.hash, "windows": len(ids), "window_length": length,
                "compensated": "every position" if setting.k_chunk else "none"}
        label = f"{row['method']} {row['bits']} bits, {setting.selection}, k_chunk {setting.k_chunk}"
        known = rows.find(row)
        if known is None:
            start = time.monotonic()
            model = model or subject.load()
            if subject.quant is not None:
                hub.set_compensation(model, setting.compensation(subject.seed, prefill=True))
            value, error = perplexity(model, ids, label)
            known = row | {"perplexity": round(value, 4), "loss_standard_error": round(error, 5), **hub.memory(model),
                           "seconds": round(time.monotonic() - start, 1)}
            rows.append(known)
        print(f"{label}: perplexity {known['perplexity']:.3f}")
    print(f"rows are in {arguments.out}")


if __name__ == "__main__":
    run(main)
