"""Share of the truly largest channels that each selection finds (the lower half of the paper's Figure 16).

The truth is the top k by |x| of the layer's whole input (less its center where a static repair has one), k the number of channels
the selection takes. The text runs through the model while it is compensated by that very selection at every position; recall is
the mean over positions and layers.
"""

import argparse
import time

import torch
from capture import layers_by_input, read_window, watching
from subject import SUBJECT_KEY, Rows, add_arguments, add_settings, folder_from_arguments
from torch import Tensor, nn
from tqdm import tqdm

from decdec import hub
from decdec.errors import run
from decdec.linear import CompensatedLinear
from decdec.models import KINDS

KEY = (*SUBJECT_KEY, "text_hash", "window_length")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    add_settings(parser, k_chunk=32)
    parser.add_argument("--text", default="wikitext", help="wikitext, c4, pydoc or a file (default wikitext)")
    parser.add_argument("--length", type=int, default=512, help="tokens of the text (default 512)")
    parser.add_argument("--out", default="evaluation/results/recall.jsonl", help="JSON-lines file the rows go to")
    return parser.parse_args()


def found(x: Tensor, channels: Tensor) -> Tensor:
    """For each row of ``x`` the share of its top k channels by |x| among ``channels`` (``(rows, k)``, -1 for none)."""
    chosen = torch.zeros((len(x), x.shape[1] + 1), dtype=torch.bool, device=x.device)
    chosen.scatter_(1, torch.where(channels < 0, x.shape[1], channels).long(), True)
    return chosen.gather(1, x.abs().topk(channels.shape[1], dim=1).indices).float().mean(dim=1)


def recall_of(layer: CompensatedLinear, rows: Tensor) -> Tensor:
    """Mean over inputs ``rows`` of what the selection of ``layer`` finds."""
    rows = layer.selected_from(rows)
    return found(rows, layer.channels(rows)).mean()


@torch.inference_mode()
def recall(model: nn.Module, ids: Tensor) -> dict[str, float]:
    """Mean recall by kind of layer, over positions and blocks."""
    seen = {kind: [] for kind in KINDS}
    with watching([layers[0] for layers in layers_by_input(model).values()],
                  lambda layer, rows: seen[layer.kind].append(recall_of(layer, rows))):
        model(ids[None].to(model.device), use_cache=False)
    return {kind: float(torch.stack(values).mean()) for kind, values in seen.items() if values}


def main() -> None:
    arguments = parse_arguments()
    subject = folder_from_arguments(arguments)
    evaluation, ids = read_window(arguments.text, arguments.model, arguments.length)
    settings = [setting for setting in subject.settings(arguments.selection, arguments.k_chunk) if setting.k_chunk]
    rows = Rows(arguments.out, KEY)
    model = None
    for setting, row in zip(tqdm(settings, desc="recall"), subject.compensated_rows("recall", settings), strict=True):
        row |= {"text": evaluation.name, "text_hash": evaluation.hash, "window_length": len(ids), "compensated": "every position"}
        known = rows.find(row)
        if known is None:
            start = time.monotonic()
            model = model or subject.load()
            hub.set_compensation(model, setting.compensation(subject.seed, prefill=True))
            by_kind = recall(model, ids)
            known = row | {"recall": round(sum(by_kind.values()) / len(by_kind), 4),
                           "recall_by_kind": {kind: round(value, 4) for kind, value in by_kind.items()},
                           "seconds": round(time.monotonic() - start, 1)}
            rows.append(known)
        print(f"{setting.selection}, k_chunk {setting.k_chunk}: recall {100 * known['recall']:.1f} %")
    print(f"rows are in {arguments.out}")


if __name__ == "__main__":
    run(main)
