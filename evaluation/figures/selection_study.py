"""The selection study in pictures and tables, from rows of selection_study.py: one picture and two tables for each base.

Left: perplexity against what a token fetches, a line a form. Right: against CPU memory, a line for each k_chunk. First
table: every variant at its k_chunk, and what it loses of the gap that the paper's residuals close at the same k_chunk. Second: the
forms at equal bytes fetched. Standard errors are jackknife ones over windows, of both variants on the same windows.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.ticker import NullLocator
from series import METHODS, bench_rows, markdown, written

from decdec import figure_style as style
from decdec.errors import UserError, run
from decdec.files import atomic

CONDITIONS = ("text_hash", "windows", "window_length", "dtype", "calibration_hash", "weights_hash")
PAPER = "paper 4"
K_CHUNKS = (0, 4, 8, 16, 32, 64, 128, 256)
Points = dict[tuple[str, int], dict]  # rows by variant and k_chunk


def jackknife(statistic: Callable[..., float], *losses: Sequence[float]) -> tuple[float, float]:
    """``statistic`` of the perplexities that each list of window losses gives, and its standard error over windows."""
    count = len(losses[0])
    sums = [sum(of) for of in losses]
    whole = statistic(*(math.exp(total / count) for total in sums))
    if count < 2:
        return whole, math.nan
    left_out = [statistic(*(math.exp((total - of[i]) / (count - 1)) for total, of in zip(sums, losses))) for i in range(count)]
    mean = sum(left_out) / count
    return whole, math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in left_out))


def share_lost(points: Points, variant: str, k_chunk: int) -> tuple[float, float] | None:
    """Percent of the gap closed by the paper's residuals at ``k_chunk`` that ``variant`` leaves open (negative: closes more)."""
    three = [points.get(key) for key in ((variant, k_chunk), (PAPER, k_chunk), (PAPER, 0))]
    if k_chunk == 0 or None in three:
        return None
    return jackknife(lambda mine, paper, base: 100 * (mine - paper) / (base - paper), *(row["losses"] for row in three))


def cell(points: Points, variant: str, k_chunk: int) -> str:
    row = points.get((variant, k_chunk))
    if row is None:
        return ""
    lost = None if variant == PAPER else share_lost(points, variant, k_chunk)
    return f"{row['perplexity']:.2f}" + ("" if lost is None else f" ({lost[0]:+.1f} ± {lost[1]:.1f})")


def variant_table(points: Points) -> list[str]:
    lines = []
    for variant in dict.fromkeys(variant for variant, _ in points):
        row = next(row for (name, _), row in points.items() if name == variant)
        lines.append((variant, f"{row['host_bytes'] / 1e6:.1f}", f"{row['added_device_bytes'] / 1e6:.2f}",
                      *(cell(points, variant, k) for k in K_CHUNKS)))
    return markdown(("variant", "CPU MB", "added GPU MB", *(f"k {k}" for k in K_CHUNKS)), lines)


def plain_forms(points: Points) -> dict[str, dict[int, dict]]:
    """``{variant: {k_chunk: row}}`` of the paper's form and of the base's own nested one, which differ in bits alone."""
    form = "nested" if any(row["form"] == "nested" for row in points.values()) else "row scales"
    found = defaultdict(dict)
    for (variant, k_chunk), row in sorted(points.items(), key=lambda item: item[0][1]):
        if k_chunk and variant in (PAPER, "paper 2", *(f"{form} {bits}" for bits in (1, 2, 3, 4))):
            found[variant][k_chunk] = row
    order = (PAPER, *(f"{form} {bits}" for bits in (2, 1, 3, 4)), "paper 2")
    return {variant: found[variant] for variant in order if variant in found}


def equal_bytes(points: Points) -> list[str]:
    """Perplexities of the forms at the bytes that the paper's residuals fetch at a ``k_chunk``, with the difference to those."""
    forms = plain_forms(points)
    lines = []
    for k_chunk, paper in sorted(forms.get(PAPER, {}).items()):
        cells = []
        for variant, rows in forms.items():
            row = rows.get(4 * k_chunk // int(variant[-1]))
            if row is None:
                cells.append("")
            elif variant == PAPER:
                cells.append(f"{row['perplexity']:.2f} (k {k_chunk})")
            else:
                gain, error = jackknife(lambda mine, theirs: mine - theirs, row["losses"], paper["losses"])
                cells.append(f"{row['perplexity']:.2f} ({gain:+.2f} ± {error:.2f}, k {row['k_chunk']})")
        if sum(map(bool, cells)) > 1:
            lines.append((f"{paper['fetched_bytes'] / 1e6:.2f}", *cells))
    return markdown(("MB a token", *forms), lines)


def draw(points: Points, out: Path) -> None:
    forms = plain_forms(points)
    with style.figure(out, ncols=2, sharey=True) as (figure, (left, right)):
        for look, (variant, rows) in zip(style.LINES, forms.items(), strict=False):
            left.plot([row["fetched_bytes"] / 1e6 for row in rows.values()], [row["perplexity"] for row in rows.values()],
                      label=f"{variant} bits", **look)
        left.set_xscale("log")
        left.set_xticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
        left.xaxis.set_minor_locator(NullLocator())
        left.set_xlabel("MB fetched a token")
        left.set_ylabel("Perplexity")
        left.legend(fontsize=5)
        for look, k_chunk in zip(style.LINES, (8, 16, 64), strict=False):
            ours = sorted((row["host_bytes"] / 1e6, row["perplexity"]) for variant, rows in forms.items()
                          if not variant.startswith("paper") and (row := rows.get(k_chunk)))
            if ours:
                right.plot(*zip(*ours), label=f"$k_{{chunk}}$ {k_chunk}", **look)
            if paper := forms.get(PAPER, {}).get(k_chunk):
                right.plot(paper["host_bytes"] / 1e6, paper["perplexity"], **look | {"markerfacecolor": "none", "markersize": 6})
        right.set_xlabel("MB of residuals")
        right.legend(fontsize=5, title="hollow: paper 4 bits", title_fontsize=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="JSON-lines files written by selection_study.py")
    parser.add_argument("--out", required=True, metavar="FOLDER",
                        help="folder for selection_study_MODEL_METHOD.pdf and .png, and selection_study.md")
    arguments = parser.parse_args()
    bases: dict[tuple, Points] = defaultdict(dict)
    for row in bench_rows(arguments.rows, "selection_study"):
        bases[row["model"], row["method"], row["bits"], *(row[name] for name in CONDITIONS)][row["variant"], row["k_chunk"]] = row
    complete = {key: points for key, points in bases.items() if (PAPER, 0) in points}
    if not complete:
        raise UserError(f"{', '.join(arguments.rows)}: no rows of variant '{PAPER}' at k_chunk 0")
    lines = []
    for (model, method, bits, *_), points in complete.items():
        row = points[PAPER, 0]
        lines += [f"## {model}, {METHODS.get(method, method)}, {bits} bits", "",
                  f"{row['windows']} windows of {row['window_length']} tokens of {row['text']}, {row['dtype']}, weights "
                  f"{row['weights_hash']}. In brackets: percent of the gap closed by {PAPER} bits at the same k_chunk that is lost, "
                  "with its standard error.", "", *variant_table(points), "",
                  "At equal bytes fetched; in brackets the difference to the paper's residuals.", "", *equal_bytes(points), ""]
        draw(points, Path(arguments.out) / f"selection_study_{model.lower()}_{method}")
        written(f"{arguments.out}/selection_study_{model.lower()}_{method}")
    with atomic(Path(arguments.out) / "selection_study.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)
