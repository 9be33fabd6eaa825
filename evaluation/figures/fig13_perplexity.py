"""Figure 13 of the paper: perplexity against k_chunk, one line a method and bit width, from rows of perplexity.py."""

import argparse

from series import TEXT, bench_rows, by_k_chunk, k_chunk_figure, written

from decdec.errors import UserError, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", help="JSON-lines files written by perplexity.py")
    parser.add_argument("--out", required=True, help="figure to write (.pdf and .png)")
    parser.add_argument("--selection", default="bucket", help="the selection whose rows are drawn (default bucket)")
    arguments = parser.parse_args()
    lines, original = by_k_chunk(bench_rows(arguments.rows, "perplexity", TEXT), "perplexity", arguments.selection)
    if not lines:
        raise UserError(f"{', '.join(arguments.rows)}: no perplexity rows of compensated models with selection {arguments.selection}")
    with k_chunk_figure(arguments.out, lines, original, "Perplexity"):
        pass
    written(arguments.out)


if __name__ == "__main__":
    run(main)
