"""Figure 16 of the paper: DecDEC's selection, exact, static and random ones: perplexity above, recall below, a column a method.

Reads rows of perplexity.py and of recall.py; of each method the model that was last measured under static or random selection.
"""

import argparse

from series import METHODS, SELECTIONS, TEXT, bench_rows, label, written

from decdec import figure_style as style
from decdec.errors import UserError, run


MODEL = ("method", "bits", "weights_hash", "repair")
SAME = (*MODEL, "residual_bits", "nested")


def like(rows: list[dict], model: dict, names: tuple[str, ...]) -> list[dict]:
    return [row for row in rows if all(row.get(name) == model.get(name) for name in names)]


def points(rows: list[dict], model: dict, selection: str, value: str) -> dict[int, float]:
    chosen = [row for row in like(rows, model, SAME) if row["selection"] == selection]
    return {row["k_chunk"]: row[value] for row in sorted(chosen, key=lambda row: row["k_chunk"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="JSON-lines files written by perplexity.py and recall.py")
    parser.add_argument("--out", required=True, help="figure to write (.pdf and .png)")
    arguments = parser.parse_args()
    perplexities = bench_rows(arguments.rows, "perplexity", TEXT)
    recalls = bench_rows(arguments.rows, "recall", ("model", "text_hash", "window_length"))
    last = {row["method"]: row for row in perplexities if row["selection"] in ("static", "random")}
    models = [last[method] for method in METHODS if method in last]
    if not models:
        raise UserError(f"{', '.join(arguments.rows)}: no perplexity rows of static or random selection")
    with style.figure(arguments.out, height=3.4, nrows=2, ncols=len(models), sharex=True, squeeze=False) as (figure, axes):
        for (upper, lower), model in zip(axes.T, models, strict=True):
            ticks = sorted({k for selection in SELECTIONS for k in points(perplexities, model, selection, "perplexity")})
            for look, (selection, name) in zip(style.LINES, SELECTIONS.items(), strict=False):
                for panel, rows, value, scale in ((upper, perplexities, "perplexity", 1), (lower, recalls, "recall", 100)):
                    line = {k: y for k, y in points(rows, model, selection, value).items() if k in ticks}
                    panel.plot([ticks.index(k) for k in line], [scale * y for y in line.values()], label=name, **look)
            base = [row["perplexity"] for row in like(perplexities, model, MODEL) if row["k_chunk"] == 0]
            if base:
                upper.axhline(base[-1], color="black", linewidth=0.8, linestyle=(0, (1, 1)), label="not compensated")
            upper.set_title(label(model))
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
