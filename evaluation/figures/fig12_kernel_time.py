"""Figure 12 of the paper: time of the compensated GEMV over the base GEMV's against k_chunk, one line an n_tb, a panel a shape.

Reads the kernel benchmark's rows (decdec_extension/benchmarks). The dotted line is the knee that the paper's law expects,
1024 / R_bw * bits / 4, R_bw the ratio of the memory's to the link's rate, both measured in the same run (or given by --r-bw).
"""

import argparse

from series import written

from decdec import figure_style as style
from decdec.errors import UserError, run
from decdec.files import read_rows

SHAPES = ((4096, 4096), (4096, 28672), (14336, 4096))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="JSON-lines files of the kernel benchmark")
    parser.add_argument("--out", required=True, help="figure to write (.pdf and .png)")
    parser.add_argument("--format", default="codebook", choices=("codebook", "uniform"))
    parser.add_argument("--bits", type=int, default=3, help="of the base weights (default 3)")
    parser.add_argument("--sms", type=int, help="rows of so many SMs (default: the most there are)")
    parser.add_argument("--n-tb", type=int, nargs="+", default=[2, 4, 8, 16, 24, 32], help="lines to draw (default 2 4 8 16 24 32)")
    parser.add_argument("--r-bw", type=float, help="memory's rate over the link's, for the knee")
    return parser.parse_args()


def rate_ratio(rows: list[dict], sms: int) -> float | None:
    """Memory's rate over the link's, from the ceilings measured in the same run."""
    rates = [max((row["gbps"] for row in rows if (row.get("bench"), row.get("sms")) == (bench, sms)), default=None)
             for bench in ("device copy", "link gather")]
    return rates[0] / rates[1] if all(rates) else None


def main() -> None:
    arguments = parse_arguments()
    every = [row for path in arguments.rows for row in read_rows(path)]
    rows = [row for row in every if row.get("bench") in ("base", "compensated") and row["batch"] == 1
            and (row["format"], row["bits"]) == (arguments.format, arguments.bits) and (row["d_in"], row["d_out"]) in SHAPES]
    if not rows:
        raise UserError(f"{', '.join(arguments.rows)}: no rows of {arguments.format} weights of {arguments.bits} bits")
    sms = arguments.sms or max(row["sms"] for row in rows)
    rows = [row for row in rows if row["sms"] == sms]
    shapes = [shape for shape in SHAPES if any((row["d_in"], row["d_out"]) == shape and row["k_chunk"] for row in rows)]
    if not shapes:
        raise UserError(f"--sms: no compensated rows of {sms} SMs")
    lines = [n_tb for n_tb in arguments.n_tb if any(row["n_tb"] == n_tb and row["k_chunk"] for row in rows)]
    ratio = arguments.r_bw or rate_ratio(every, sms)
    with style.figure(arguments.out, height=0.6 + 1.5 * len(shapes), nrows=len(shapes), sharex=True, squeeze=False) as (figure, axes):
        for panel, (d_in, d_out) in zip(axes[:, 0], shapes, strict=True):
            here = [row for row in rows if (row["d_in"], row["d_out"]) == (d_in, d_out)]
            base = min(row["us"] for row in here if row["k_chunk"] == 0)
            for look, n_tb in zip(style.LINES, lines, strict=False):
                points = {0: 1.0} | {row["k_chunk"]: row["us"] / base for row in here if row["n_tb"] == n_tb and row["k_chunk"]}
                panel.plot(sorted(points), [points[k] for k in sorted(points)], label=f"$n_{{tb}}$ = {n_tb}", **look)
            if ratio:
                panel.axvline(1024 / ratio * arguments.bits / 4, color="black", linewidth=0.8, linestyle=(0, (1, 1)),
                              label="expected knee")
            panel.set_title(f"{d_in} x {d_out}, base {base:.1f} us")
            panel.set_ylabel("Time over base")
            panel.set_ylim(bottom=0.9)
        figure.suptitle(f"{rows[0]['device']}, {sms} SMs, {arguments.format} {arguments.bits} bits", fontsize=8)
        axes[-1, 0].set_xlabel("$k_{chunk}$ (channels per 1024)")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    written(arguments.out)


if __name__ == "__main__":
    run(main)
