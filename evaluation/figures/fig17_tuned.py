"""Figures 17 and 18 of the paper: perplexity against time a token at the tuner's targets, a panel a GPU, from rows of tuned.py.

Each line starts at the base weights alone; the points after it are the targets. Figure 17 is drawn for the paper's five client
GPUs, Figure 18 for others (--gpus). A panel's title says whether its times were measured, predicted, simulated or by the paper's law.
"""

import argparse

from series import bench_rows, label, written

from decdec import figure_style as style
from decdec.errors import UserError, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="JSON-lines files written by tuned.py")
    parser.add_argument("--out", required=True, help="figure to write (.pdf and .png)")
    parser.add_argument("--gpus", nargs="+", metavar="NAME", help="GPUs to draw (default all)")
    arguments = parser.parse_args()
    rows = bench_rows(arguments.rows, "tuned", ("model", "text_hash", "windows", "window_length", "dtype"))
    gpus = arguments.gpus or list(dict.fromkeys(row["gpu"] for row in rows))
    if missing := set(gpus) - {row["gpu"] for row in rows}:
        raise UserError(f"--gpus: no rows of {', '.join(sorted(missing))}")
    labels = sorted({label(row) for row in rows})
    with style.figure(arguments.out, height=0.5 + 1.5 * len(gpus), nrows=len(gpus), squeeze=False) as (figure, axes):
        for panel, gpu in zip(axes[:, 0], gpus, strict=True):
            for look, name in zip(style.LINES, labels, strict=False):
                points = sorted((row for row in rows if row["gpu"] == gpu and label(row) == name),
                                key=lambda row: row["target_percent"])
                panel.plot([row["ms_per_token"] for row in points], [row["perplexity"] for row in points], label=name, **look)
            panel.set_title(f"{gpu}, times {', '.join(sorted({row['timing'] for row in rows if row['gpu'] == gpu}))}")
            panel.set_ylabel("Perplexity")
            panel.locator_params(axis="x", nbins=6)
        axes[-1, 0].set_xlabel("Time a token (ms)")
        targets = ", ".join(f"{target:g}" for target in sorted({row["target_percent"] for row in rows} - {0}))
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                      title=f"From the left: no compensation, targets of {targets} %", title_fontsize=7)
    written(arguments.out)


if __name__ == "__main__":
    run(main)
