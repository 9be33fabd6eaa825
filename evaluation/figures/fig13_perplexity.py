"""Figure 13 of the paper: perplexity against k_chunk, one line a method and bit width, from rows of perplexity.py."""

import argparse
from collections import defaultdict

from decdec import figure_style as style
from decdec.errors import UserError, run
from decdec.files import read_rows

NAMES = {"awq": "AWQ", "squeezellm": "SqueezeLLM", "rtn": "round to nearest", "gptq": "GPTQ"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", help="JSON-lines file written by perplexity.py")
    parser.add_argument("--out", required=True, help="figure to write (.pdf and .png)")
    parser.add_argument("--selection", default="bucket", help="the selection whose rows are drawn (default bucket)")
    arguments = parser.parse_args()

    lines, original = defaultdict(dict), None
    for row in read_rows(arguments.rows):
        if row["method"] == "original":
            original = row["perplexity"]
        elif row["selection"] in ("none", arguments.selection):
            lines[row["method"], str(row["bits"])][row["k_chunk"]] = row["perplexity"]
    if not lines:
        raise UserError(f"{arguments.rows}: no perplexity rows of quantized models with selection {arguments.selection}")

    with style.figure(arguments.out) as (_, axes):
        ticks = sorted({k_chunk for points in lines.values() for k_chunk in points})
        for look, ((method, bits), points) in zip(style.LINES, sorted(lines.items()), strict=False):
            # Even steps from 0, as the paper draws it: a logarithmic axis would lose k_chunk = 0.
            axes.plot([ticks.index(k) for k in sorted(points)], [points[k] for k in sorted(points)],
                      label=f"{NAMES.get(method, method)}, {bits} bits", **look)
        if original is not None:
            axes.axhline(original, color="black", linewidth=0.8, linestyle=(0, (1, 1)), label="full precision")
        axes.set_xticks(range(len(ticks)), [str(k) for k in ticks])
        axes.set_xlabel("$k_{chunk}$ (channels per 1024)")
        axes.set_ylabel("Perplexity")
        axes.legend()
    print(f"wrote {arguments.out} as PDF and PNG")


if __name__ == "__main__":
    run(main)
