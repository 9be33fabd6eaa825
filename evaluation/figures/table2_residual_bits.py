"""Table 2 of the paper: perplexity by residual bits and k_chunk, grouped by traffic, from rows of perplexity.py.

Bits times k_chunk is what a chunk's fetch moves: 4 bits at k_chunk 8 move as much as 2 bits at 16, 8 at 4 and 16 at 2.
The best of each group stands in bold.
"""

import argparse
from collections import defaultdict

from series import TEXT, bench_rows, markdown, of_last_models

from decdec.errors import UserError, run
from decdec.files import atomic

BITS = (2, 4, 8, 16)


def tables(rows: list[dict], selection: str) -> list[str]:
    """Lines of one Markdown table a model."""
    cells, base = defaultdict(dict), {}
    for name, row in of_last_models(rows):
        if row["k_chunk"] == 0:
            base[name] = row["perplexity"]
        elif row["selection"] == selection and not row["nested"]:
            cells[name][row["residual_bits"] * row["k_chunk"], row["residual_bits"]] = row["perplexity"]
    lines = []
    for name, values in sorted(cells.items()):
        if len({bits for _, bits in values}) < 2:
            continue
        found = []
        for traffic in sorted({traffic for traffic, _ in values}):
            group = {bits: values.get((traffic, bits)) for bits in BITS}
            if sum(value is not None for value in group.values()) < 2:
                continue
            best = min(value for value in group.values() if value is not None)
            marked = [f"{'**' * (value == best)}{value:.2f}{'**' * (value == best)} (k {traffic // bits})" if value else "-"
                      for bits, value in group.items()]
            found.append((f"{traffic / 4:g}", *marked))
        lines += [f"{name}: perplexity {base[name]:.2f} without compensation" if name in base else name, "",
                  *markdown(("traffic (4-bit k_chunk)", *(f"{bits} bits" for bits in BITS)), found), ""]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="JSON-lines files written by perplexity.py with several --cheatsheet")
    parser.add_argument("--selection", default="bucket", help="the selection whose rows are read (default bucket)")
    parser.add_argument("--out", help="Markdown file to write as well")
    arguments = parser.parse_args()
    rows = [row for row in bench_rows(arguments.rows, "perplexity", TEXT) if row["method"] != "original"]
    lines = tables(rows, arguments.selection)
    if not lines:
        raise UserError(f"{', '.join(arguments.rows)}: no rows of two residual widths with selection {arguments.selection}")
    table = "\n".join(lines).strip() + "\n"
    print(table, end="")
    if arguments.out:
        with atomic(arguments.out) as temporary:
            temporary.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    run(main)
