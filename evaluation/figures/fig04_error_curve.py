"""Figure 4 of the paper: output error against restored input channels, in order of |x| and at random, from rows of error_curve.py.

One panel a kind of layer; errors and |x| are relative to their value at no restored channel.
"""

import argparse

from series import KINDS, METHODS, bench_rows, written

from decdec import figure_style as style
from decdec.errors import run

ORDERS = {"sorted": "by $|x|$", "random": "at random"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", help="JSON-lines files written by error_curve.py")
    parser.add_argument("--out", required=True, help="figure to write (.pdf and .png)")
    parser.add_argument("--method", help="method to draw (default: that of the last row)")
    arguments = parser.parse_args()
    rows = bench_rows(arguments.rows, "error_curve", ("weights_hash", "text_hash", "window_length", "positions", "dtype"),
                      lambda row: arguments.method in (None, row["method"]))
    method = rows[-1]["method"]
    blocks = sorted({row["block"] for row in rows})
    with style.figure(arguments.out, height=3.4, nrows=2, ncols=2, sharex=True, sharey=True) as (figure, axes):
        for panel, kind in zip(axes.flat, KINDS, strict=True):
            for look, block in zip(style.LINES, blocks, strict=False):
                for order in ORDERS:
                    same = [row for row in rows if (row["block"], row["kind"], row["order"]) == (block, kind, order)]
                    if not same:  # an interrupted measurement
                        continue
                    row = same[-1]
                    share = [100 * count / row["d_in"] for count in row["restored"]]
                    by_size = order == "sorted"
                    panel.plot(share, [mse / row["mse"][0] for mse in row["mse"]], color=look["color"], marker=look["marker"],
                               markevery=4 if by_size else (2, 8), markersize=3, linewidth=1.2 if by_size else 0.7,
                               linestyle="-" if by_size else "--", label=f"block {block}, {ORDERS[order]}")
            magnitude = row["magnitude"]
            panel.plot(share, [value / magnitude[0] for value in magnitude], color="black", linewidth=0.8, linestyle=":",
                       label=f"sorted $|x|$, block {block}")
            panel.set_title(KINDS[kind])
        for panel in axes[1]:
            panel.set_xlabel("Channels restored (%)")
        figure.supylabel(f"Output error, relative ({METHODS.get(method, method)})", fontsize=8)
        handles, names = panel.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=6.5)
    written(arguments.out)


if __name__ == "__main__":
    run(main)
