"""The selection study: perplexity against bytes fetched a token, for residual forms and ways to choose channels beyond the paper's.

Everything is emulated with dense matrices: exact top-k by |x| where not said otherwise, every position of a window compensated on
its own channels. One JSON line a variant and k_chunk, with the loss of each window (so that two variants can be compared in
pairs), the bytes fetched a token, those of the residuals in CPU memory and those added to GPU memory. A setting whose line is
there already is not run again.
"""

import argparse
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from selection_study_calibration import Seen, calibrate, constant_share, low_rank, spread
from selection_study_forms import FORMS
from selection_study_layers import Choice, StudyLinear, study_model
from subject import SUBJECT_KEY, Rows, add_arguments, folder_from_arguments
from torch import Tensor, nn
from tqdm import tqdm

from decdec import artifacts, models, packing, text
from decdec.errors import UserError, run
from decdec.reference import CHUNK

KEY = (*SUBJECT_KEY, "variant", "text_hash", "windows", "window_length", "calibration_hash", "samples")
MAIN, SOME, ALSO_NONE = (8, 16, 32, 64), (16, 64), (0, 16, 64)


@dataclass(frozen=True)
class Variant:
    """One way to compensate. ``tiers`` are (share of k_chunk, bits) by rank of |x|; ``width`` is of a chunk, None the whole vector.

    ``by_norm`` ranks by |x| times the norm of the residual row; ``spread`` gives every layer its own k_chunk at the same bytes;
    ``centred`` subtracts the mean input where it makes more than that share of the error; ``rank`` is of a static repair.
    """

    form: str
    bits: int
    k_chunks: tuple[int, ...] = SOME
    tiers: tuple[tuple[float, int], ...] = ()
    width: int | None = CHUNK
    by_norm: bool = False
    spread: bool = False
    centred: float | None = None
    rank: int = 0

    @property
    def name(self) -> str:
        bits = "/".join(f"{share:.2g}x{bits}" for share, bits in self.tiers) or str(self.bits)
        extra = [(self.width != CHUNK, "whole vector" if self.width is None else f"chunks of {self.width}"),
                 (self.by_norm, "ranked with row norms"), (self.spread, "k_chunk by layer"),
                 (self.centred is not None, f"centred where above {self.centred:g}" if self.centred else "centred"),
                 (self.rank > 0, f"rank {self.rank}")]
        return ", ".join([f"{self.form} {bits}", *(words for holds, words in extra if holds)])

    def all_tiers(self) -> tuple[tuple[float, int], ...]:
        return self.tiers or ((1.0, self.bits),)


def variants(uniform: bool) -> list[Variant]:
    """The variants for a base format, the most telling first."""
    best, planes = ("nested", "nested") if uniform else ("row scales", "row planes")
    found = [Variant("paper", 4, (0, 4, *MAIN, 128)), Variant(best, 2, (*MAIN, 128)), Variant(best, 1, (*MAIN, 128, 256)),
             Variant(best, 3, MAIN), Variant(best, 4, MAIN), Variant("paper", 2, (*MAIN, 128)), Variant("exact", 16, (*MAIN, CHUNK))]
    others = ["row scales"] if uniform else ["table", "weighted table", "cell"]
    found += [Variant(form, 2) for form in ["fitted", "groups of 64", *others]]
    found += [Variant(best, 2, centred=share, k_chunks=ALSO_NONE) for share in (0.0, 0.1)]
    found += [Variant("paper", 4, rank=rank, k_chunks=ALSO_NONE) for rank in (4, 8, 16)]
    found += [Variant("row scales", 2, rank=8, k_chunks=ALSO_NONE)]
    found += [Variant(planes, 0, tiers=tiers) for tiers in (((0.5, 2), (1.0, 1)), ((0.25, 4), (0.25, 2), (0.5, 1)),
                                                            ((1 / 3, 3), (1 / 3, 2), (1 / 3, 1)))]
    found += [Variant(best, 2, spread=True), Variant(best, 2, by_norm=True)]
    return found + [Variant(best, 2, width=width) for width in (256, 512, None)]


def prepare(variant: Variant, k_chunk: int, layers: Mapping[str, StudyLinear], seen: Mapping[str, Seen], host: dict) -> dict:
    """Set every layer for a variant; returns what it costs: bytes fetched a token, of residuals, added to the GPU's memory.

    ``host`` keeps the dense residuals of the variant from one k_chunk to the next.
    """
    own = spread(layers, seen, k_chunk) if variant.spread and k_chunk else {}
    fetched = stored = added = 0
    for name, layer in layers.items():
        layer.plain()
        target, energy = layer.exact, seen[name].energy
        if variant.rank:
            layer.repair = low_rank(layer, seen[name], variant.rank)
            target = layer.exact - layer.repair
            added += 2 * variant.rank * (layer.d_in + layer.d_out)
        if variant.centred is not None and constant_share(layer, seen[name]) >= variant.centred:
            layer.mean = seen[name].mean
            added += 4 * layer.d_in + 2 * layer.d_out
        if name not in host:
            host[name] = [FORMS[variant.form](layer, target, bits, energy) for _, bits in variant.all_tiers()]
        layer.residuals = [dense.to(layer.weight.dtype) for dense, _ in host[name]]
        layer.norms = layer.residuals[0].float().norm(dim=0) if variant.by_norm else None
        layer.choice = Choice(own.get(name, k_chunk), variant.width, tuple(share for share, _ in variant.all_tiers()))
        for _, counts in layer.choice.counts(layer.d_in):
            for count, below, (_, bits) in zip(counts, [0, *counts], variant.all_tiers()):
                fetched += (count - below) * packing.residual_row_bytes(layer.d_out, bits)
        stored += layer.d_in * packing.residual_row_bytes(layer.d_out, max(bits for _, bits in variant.all_tiers()))
        added += max(size for _, size in host[name])
    return {"fetched_bytes": fetched, "host_bytes": stored, "added_device_bytes": added}


@torch.inference_mode()
def losses(model: nn.Module, ids: Tensor, batch: int, label: str) -> list[float]:
    """Mean loss of each window of ``ids``, int64 ``(windows, length)``."""
    found = []
    for part in tqdm(ids.split(batch), desc=label, leave=False):
        logits = model(part, use_cache=False).logits
        for window, predicted in zip(part, logits):
            found.append(float(nn.functional.cross_entropy(predicted[:-1].float(), window[1:]).double()))
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--text", default="wikitext", help="wikitext, c4, pydoc or a file (default wikitext)")
    parser.add_argument("--windows", type=int, help="number of windows (default all)")
    parser.add_argument("--length", type=int, default=2048, help="tokens a window (default 2048)")
    parser.add_argument("--batch", type=int, default=1, help="windows at once (default 1)")
    parser.add_argument("--calibration", default="c4", help="text that the calibrated variants see (default c4)")
    parser.add_argument("--samples", type=int, default=8, help="its samples of --length tokens (default 8)")
    parser.add_argument("--variant", action="append", metavar="NAME", help="only this one, by its name in the rows; may be repeated")
    parser.add_argument("--k-chunk", type=int, nargs="+", default=(), metavar="K", help="only these (default: those of each variant)")
    parser.add_argument("--out", default="evaluation/results/selection_study.jsonl", help="JSON-lines file the rows go to")
    arguments = parser.parse_args()
    for name in ("length", "batch", "samples"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}: expected a positive number, got {getattr(arguments, name)}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    subject = folder_from_arguments(arguments)
    sheet = artifacts.load_cheatsheet(subject.cheatsheet or Path(arguments.model) / "residual_16.pt", subject.quant)
    if sheet.bits != 16:
        raise UserError(f"--cheatsheet: expected exact residuals (cheatsheet.py --bits 16), got {sheet.bits} bits")
    wanted = variants(subject.quant.format == "uniform")
    if unknown := set(arguments.variant or ()) - {variant.name for variant in wanted}:
        raise UserError(f"--variant: expected one of {'; '.join(variant.name for variant in wanted)}; got {min(unknown)!r}")
    evaluation, calibration = text.load_text(arguments.text, "evaluation"), text.load_text(arguments.calibration, "calibration")
    tokenizer = models.load_tokenizer(arguments.model)
    ids = text.windows(evaluation, tokenizer, arguments.length, arguments.windows).to(subject.device)
    shared = subject.describe("selection_study") | {
        "selection": "exact", "thresholds": None, "text": evaluation.name, "text_hash": evaluation.hash, "windows": len(ids),
        "window_length": arguments.length, "calibration": calibration.name, "calibration_hash": calibration.hash,
        "samples": arguments.samples}
    if subject.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TensorFloat-32, in every variant alike
        shared["dtype"] = "tf32" if subject.dtype == "float32" else subject.dtype
    rows = Rows(arguments.out, KEY)
    todo = [(variant, [k for k in variant.k_chunks if not arguments.k_chunk or k in arguments.k_chunk]) for variant in wanted
            if not arguments.variant or variant.name in arguments.variant]
    model = layers = seen = None
    for variant, k_chunks in todo:
        host = {}
        for k_chunk in k_chunks:
            row = shared | {"variant": variant.name, "form": variant.form, "residual_bits": variant.bits, "k_chunk": k_chunk,
                            "nested": variant.form != "paper"}
            known = rows.find(row)
            if known is None:
                if model is None:
                    model, layers = study_model(subject, sheet)
                    samples = text.calibration_samples(calibration, tokenizer, arguments.samples, arguments.length, subject.seed)
                    seen = calibrate(model, layers, samples.to(subject.device))
                start = time.monotonic()
                with torch.inference_mode():
                    costs = prepare(variant, k_chunk, layers, seen, host)
                found = losses(model, ids, arguments.batch, f"{variant.name}, k_chunk {k_chunk}")
                known = row | costs | {"perplexity": round(math.exp(sum(found) / len(found)), 4),
                                       "losses": [round(loss, 6) for loss in found],
                                       "seconds": round(time.monotonic() - start, 2)}
                rows.append(known)
            print(f"{variant.name}, k_chunk {k_chunk}: perplexity {known['perplexity']:.3f}, "
                  f"{known['fetched_bytes'] / 1e6:.2f} MB a token", flush=True)
    print(f"rows are in {arguments.out}")


if __name__ == "__main__":
    run(main)
