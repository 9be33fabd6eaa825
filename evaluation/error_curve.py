"""Output error of a layer against the number of input channels restored to full precision (the paper's Figure 4).

Channels are restored in descending order of |x|, and in random order. The residual is the exact one (decdec_setup/cheatsheet.py
--bits 16), the inputs are those of the quantized model at some positions of a text. One row a block, kind of layer and order.
"""

import argparse

import torch
from capture import layer_inputs, layers_by_input, quarter_blocks, read_window
from subject import SUBJECT_KEY, Rows, Setting, add_arguments, folder_from_arguments
from torch import Tensor
from tqdm import tqdm

from decdec import artifacts, packing
from decdec.errors import UserError, run
from decdec.models import KINDS

KEY = (*SUBJECT_KEY, "block", "kind", "order", "text_hash", "window_length", "positions")
ORDERS = ("sorted", "random")
POINTS = 32


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--text", default="wikitext", help="wikitext, c4, pydoc or a file (default wikitext)")
    parser.add_argument("--length", type=int, default=512, help="tokens of the text (default 512)")
    parser.add_argument("--positions", type=int, default=16, help="positions averaged over (default 16)")
    parser.add_argument("--out", default="evaluation/results/error_curve.jsonl", help="JSON-lines file the rows go to")
    arguments = parser.parse_args()
    if not 1 <= arguments.positions < arguments.length:
        raise UserError(f"--positions: expected 1 up to --length {arguments.length}, got {arguments.positions}")
    return arguments


def curve(x: Tensor, residual: Tensor, orders: Tensor, counts: list[int]) -> list[float]:
    """Mean squared output error when the first ``counts[j]`` channels of each row's order are restored.

    ``x`` and ``orders`` are ``(positions, d_in)``, ``residual`` is ``(d_in, d_out)``; ``counts`` ascend from 0 to d_in.
    """
    errors = torch.zeros(len(counts), dtype=torch.float64, device=x.device)
    for row, order in zip(x, orders, strict=True):
        missing = torch.zeros(residual.shape[1], device=x.device)
        for j in reversed(range(len(counts) - 1)):
            part = order[counts[j]:counts[j + 1]]
            missing += row[part] @ residual[part]
            errors[j] += missing.double().square().mean()
    return (errors / len(x)).tolist()


def main() -> None:
    arguments = parse_arguments()
    subject = folder_from_arguments(arguments)
    evaluation, ids = read_window(arguments.text, arguments.model, arguments.length)
    shared, = subject.compensated_rows("error_curve", [Setting()])
    sheet = artifacts.load_cheatsheet(subject.cheatsheet or f"{arguments.model}/{artifacts.CHEATSHEET}", subject.quant)
    if sheet.bits != 16:
        raise UserError(f"--cheatsheet: expected exact residuals (cheatsheet.py --bits 16), got {sheet.bits} bits")
    shared |= {"text": evaluation.name, "text_hash": evaluation.hash, "window_length": len(ids), "positions": arguments.positions,
               "residual_bits": 16}
    rows = Rows(arguments.out, KEY)

    model = subject.load()
    wanted = [(block, kind) for block in quarter_blocks(model) for kind in KINDS]
    todo = [(key, order) for key in wanted for order in ORDERS
            if rows.find(shared | {"block": key[0], "kind": key[1], "order": order}) is None]
    inputs = layer_inputs(model, ids, wanted) if todo else {}
    # Not the first position: its activations (the attention sink) are unlike all others.
    chosen = torch.linspace(1, len(ids) - 1, arguments.positions).long()
    for (block, kind), order in tqdm(todo, desc="error curves"):
        x = inputs[block, kind][chosen].to(subject.device)
        residual = torch.cat([packing.unpack_residual(sheet.residual[layer.name], 16, layer.out_features).float()
                              for layer in layers_by_input(model)[block, kind]], dim=1).to(subject.device)
        magnitudes = x.abs().sort(dim=1, descending=True)
        generator = torch.Generator().manual_seed(arguments.seed)
        orders = magnitudes.indices if order == "sorted" else torch.rand(x.shape, generator=generator).argsort(dim=1).to(x.device)
        counts = torch.linspace(0, x.shape[1], POINTS + 1).round().long().tolist()
        mean_magnitude = magnitudes.values.mean(dim=0)
        rows.append(shared | {"block": block, "kind": kind, "order": order, "d_in": x.shape[1], "restored": counts,
                              "mse": [float(f"{error:.6g}") for error in curve(x, residual, orders, counts)],
                              "magnitude": [float(f"{mean_magnitude[min(count, x.shape[1] - 1)]:.6g}") for count in counts]})
    for block, kind in wanted:
        left = {order: rows.find(shared | {"block": block, "kind": kind, "order": order})["mse"] for order in ORDERS}
        eighth = POINTS // 8
        print(f"block {block} {kind}: error left with an eighth of the channels restored: "
              + ", ".join(f"{order} {100 * mse[eighth] / mse[0]:.1f} %" for order, mse in left.items()))
    print(f"rows are in {arguments.out}")


if __name__ == "__main__":
    run(main)
