"""How the channels of largest |x| change from one decoding step to the next (the paper's Figure 5).

A text runs through the quantized model; consecutive positions are decoding steps on it. For the down projections of three blocks:
the top 5 % channels of every step among the first 512, and the share of every step's top 1 % and 5 % that a static list finds (the
channels of largest mean square in calibration, from thresholds.pt). One row a block.
"""

import argparse

import torch
from capture import layer_inputs, layers_by_input, quarter_blocks, read_window
from subject import SUBJECT_KEY, Rows, Setting, add_arguments, folder_from_arguments
from torch import Tensor

from decdec import artifacts
from decdec.errors import UserError, run

KEY = (*SUBJECT_KEY, "block", "kind", "text_hash", "first_step", "steps")
FRACTIONS = (0.01, 0.05)
DRAWN = 512  # channels in the map


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--text", default="wikitext", help="wikitext, c4, pydoc or a file (default wikitext)")
    parser.add_argument("--first-step", type=int, default=64, help="tokens read before the first step (default 64)")
    parser.add_argument("--steps", type=int, default=100, help="decoding steps (default 100)")
    parser.add_argument("--out", default="evaluation/results/outliers.jsonl", help="JSON-lines file the rows go to")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.first_step < 1:
        raise UserError("--steps, --first-step: expected positive numbers")
    return arguments


def static_recall(x: Tensor, mean_square: Tensor, fraction: float) -> list[float]:
    """For each row of ``x`` the share of its top ``fraction`` of channels by |x| that is also in the top by ``mean_square``."""
    count = max(1, round(fraction * x.shape[1]))
    static = torch.zeros(x.shape[1], dtype=torch.bool)
    static[mean_square.topk(count).indices] = True
    return static[x.abs().topk(count, dim=1).indices].float().mean(dim=1).tolist()


def main() -> None:
    arguments = parse_arguments()
    subject = folder_from_arguments(arguments)
    end = arguments.first_step + arguments.steps
    evaluation, ids = read_window(arguments.text, arguments.model, end)
    thresholds = artifacts.load_thresholds(f"{arguments.model}/{artifacts.THRESHOLDS}", subject.quant)
    shared, = subject.compensated_rows("outliers", [Setting()])
    shared |= {"text": evaluation.name, "text_hash": evaluation.hash, "first_step": arguments.first_step, "steps": arguments.steps}
    rows = Rows(arguments.out, KEY)

    model = subject.load()
    wanted = [(block, "d") for block in quarter_blocks(model)]
    inputs = layer_inputs(model, ids, wanted)
    for block, kind in wanted:
        row = shared | {"block": block, "kind": kind}
        known = rows.find(row)
        if known is None:
            x = inputs[block, kind][arguments.first_step:end]
            mean_square = thresholds.mean_square[layers_by_input(model)[block, kind][0].name]
            top = x.abs().topk(max(1, round(FRACTIONS[1] * x.shape[1])), dim=1).indices
            recall = {str(fraction): [round(value, 4) for value in static_recall(x, mean_square, fraction)] for fraction in FRACTIONS}
            known = row | {"d_in": x.shape[1], "recall": recall,
                           "outliers": [sorted(channel for channel in step.tolist() if channel < DRAWN) for step in top]}
            rows.append(known)
        means = {fraction: sum(values) / len(values) for fraction, values in known["recall"].items()}
        print(f"block {block} {kind}: a static list finds " +
              ", ".join(f"{100 * mean:.1f} % of the top {float(fraction):.0%}" for fraction, mean in means.items()))
    print(f"rows are in {arguments.out}")


if __name__ == "__main__":
    run(main)
