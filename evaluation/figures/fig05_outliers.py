"""Figure 5 of the paper: outlier channels over decoding steps, and what a static list finds of them, from rows of outliers.py."""

import argparse

import numpy as np
from series import bench_rows, written

from decdec import figure_style as style
from decdec.errors import run

DRAWN = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", help="JSON-lines files written by outliers.py")
    parser.add_argument("--out", required=True, help="figure to write (.pdf and .png)")
    arguments = parser.parse_args()
    rows = bench_rows(arguments.rows, "outliers", ("weights_hash", "text_hash", "first_step", "steps"))
    rows.sort(key=lambda row: row["block"])
    with style.figure(arguments.out, height=1.1 * len(rows) + 1.4, nrows=len(rows) + 1) as (_, axes):
        for panel, row in zip(axes, rows, strict=False):
            steps = [step for step, channels in enumerate(row["outliers"]) for _ in channels]
            channels = [channel for chosen in row["outliers"] for channel in chosen]
            panel.hlines(channels, steps, [step + 1 for step in steps], color="black", linewidth=0.5)
            panel.set(title=f"block {row['block']}, down: top 5 % channels", xlim=(0, row["steps"]), ylim=(0, min(DRAWN, row["d_in"])))
            panel.set_ylabel("Channel")
            panel.grid(False)
        for number, (look, row) in enumerate(zip(style.LINES, rows, strict=False)):
            for offset, (fraction, values) in enumerate(row["recall"].items()):
                x = offset + 0.25 * (number - (len(rows) - 1) / 2)
                axes[-1].bar(x, 100 * np.mean(values), width=0.22, color=look["color"], hatch=("", "//", "..")[number % 3],
                             edgecolor="white", yerr=100 * np.std(values), error_kw={"linewidth": 0.7},
                             label=f"block {row['block']}" if offset == 0 else None)
        axes[-2].set_xlabel("Decoding step")
        axes[-1].set_xticks(range(len(rows[0]["recall"])), [f"top {100 * float(fraction):g} %" for fraction in rows[0]["recall"]])
        axes[-1].set(ylabel="Static recall (%)", ylim=(0, 100))
        axes[-1].legend(ncols=len(rows), handlelength=1.5, loc="upper right")
    written(arguments.out)


if __name__ == "__main__":
    run(main)
