"""Figure from the rows of kernels.py, like the paper's Figure 12: compensated time over base time against k_chunk, by
n_tb.

python figure.py results/h100.jsonl --layer 4096 28672 --out results/h100_gu_w3
"""

import argparse
import itertools
from pathlib import Path

from decdec import figure_style, files
from decdec.errors import UserError, run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "rows", type=Path, help="JSON lines that kernels.py appended; of equal measurements the last counts"
    )
    parser.add_argument("--layer", nargs=2, type=int, default=(4096, 28672), metavar=("D_IN", "D_OUT"))
    parser.add_argument("--format", choices=("codebook", "uniform"), default="codebook")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=3)
    parser.add_argument("--sms", type=int, default=132)
    parser.add_argument("--device", help="GPU whose rows to draw, where there are several's")
    parser.add_argument("--out", type=Path, required=True, help="figure to write, as .pdf and .png")
    arguments = parser.parse_args()
    d_in, d_out = arguments.layer
    wanted = {
        "d_in": d_in,
        "d_out": d_out,
        "format": arguments.format,
        "bits": arguments.bits,
        "sms": arguments.sms,
        "batch": 1,
    }
    if arguments.device:
        wanted["device"] = arguments.device
    rows = [row for row in files.read_rows(arguments.rows) if wanted.items() <= row.items()]
    devices = sorted({row["device"] for row in rows})
    if len(devices) > 1:
        raise UserError(f"--device: expected one of {', '.join(devices)}, whose rows {arguments.rows} holds, got none")
    base = [row["us"] for row in rows if row["bench"] == "base"]
    lines = {}
    for row in rows:
        if row["bench"] == "compensated":
            lines.setdefault(row["n_tb"], {})[row["k_chunk"]] = row["us"]
    if not base or not lines:
        raise UserError(
            f"{arguments.rows}: expected base and compensated rows of {wanted}, found none; run kernels.py --json first"
        )
    with figure_style.figure(arguments.out) as (_, axes):
        for look, (n_tb, points) in zip(itertools.cycle(figure_style.LINES), sorted(lines.items())):
            ks = sorted(points)
            axes.plot([0, *ks], [1.0, *(points[k] / base[-1] for k in ks)], label=f"$n_{{tb}}$ = {n_tb}", **look)
        axes.set_xlabel("$k_{chunk}$ (channels per 1024)")
        axes.set_ylabel("time over base GEMV")
        axes.set_title(
            f"{d_in}x{d_out}, {arguments.format}, {arguments.bits} bits\n{devices[0]}, {arguments.sms} SMs"
        )
        axes.legend()


if __name__ == "__main__":
    run(main)
