"""Figure 16 of the paper: DecDEC's selection, exact, static and random ones: perplexity above, recall below, a column a method.

Reads rows of perplexity.py and of recall.py.
"""

import argparse

from series import METHODS, SELECTIONS, TEXT, bench_rows, written

from decdec import figure_style as style
from decdec.errors import UserError, run


def points(rows: list[dict], method: str, selection: str, value: str) -> dict[int, float]:
    chosen = [row for row in rows if row["method"] == method and row["selection"] == selection and row["residual_bits"] == 4
              and not row["nested"] and row["bits"] == 3]
    return {row["k_chunk"]: row[value] for row in sorted(chosen, key=lambda row: row["k_chunk"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="JSON-lines files written by perplexity.py and recall.py")
    parser.add_argument("--out", required=True, help="figure to write (.pdf and .png)")
    arguments = parser.parse_args()
    perplexities = bench_rows(arguments.rows, "perplexity", TEXT)
    recalls = bench_rows(arguments.rows, "recall", ("model", "text_hash", "window_length"))
    methods = [method for method in METHODS if any(points(perplexities, method, other, "perplexity") for other in ("static", "random"))]
    if not methods:
        raise UserError(f"{', '.join(arguments.rows)}: no perplexity rows of static or random selection at 3 bits")
    with style.figure(arguments.out, height=3.4, nrows=2, ncols=len(methods), sharex=True, squeeze=False) as (figure, axes):
        for (upper, lower), method in zip(axes.T, methods, strict=True):
            ticks = sorted({k for selection in SELECTIONS for k in points(perplexities, method, selection, "perplexity")})
            for look, (selection, name) in zip(style.LINES, SELECTIONS.items(), strict=False):
                for panel, rows, value, scale in ((upper, perplexities, "perplexity", 1), (lower, recalls, "recall", 100)):
                    line = {k: y for k, y in points(rows, method, selection, value).items() if k in ticks}
                    panel.plot([ticks.index(k) for k in line], [scale * y for y in line.values()], label=name, **look)
            base = [row["perplexity"] for row in perplexities if (row["method"], row["bits"], row["k_chunk"]) == (method, 3, 0)]
            if base:
                upper.axhline(base[0], color="black", linewidth=0.8, linestyle=(0, (1, 1)), label="not compensated")
            upper.set_title(f"{METHODS[method]}, 3 bits")
            lower.set_ylim(0, 100)
            lower.set_xlabel("$k_{chunk}$")
            lower.set_xticks(range(len(ticks)), [str(k) for k in ticks])
        axes[0, 0].set_ylabel("Perplexity")
        axes[1, 0].set_ylabel("Recall (%)")
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3)
    written(arguments.out)


if __name__ == "__main__":
    run(main)
