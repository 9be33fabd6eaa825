"""Figure 15 of the paper: MT-Bench score against k_chunk, one line a method and bit width, from rows of mt_bench_judge.py.

Runs with several seeds are averaged (the paper: three). Prompts are not compensated.
"""

import argparse

from series import bench_rows, by_k_chunk, k_chunk_figure, written

from decdec.errors import run

STAND_IN = "stand-in"  # stand_in_judge.py


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", help="JSON-lines files written by mt_bench_judge.py")
    parser.add_argument("--out", required=True, help="figure to write (.pdf and .png)")
    parser.add_argument("--selection", default="bucket", help="the selection whose rows are drawn (default bucket)")
    arguments = parser.parse_args()
    rows = [row for row in bench_rows(arguments.rows, "mt_bench", ("model", "judge", "questions", "max_new_tokens"))
            if row["compensated"] in ("none", "generated tokens")]
    lines, original = by_k_chunk(rows, "score", arguments.selection)
    with k_chunk_figure(arguments.out, lines, original, "MT-Bench score") as axes:
        judge = rows[-1]["judge"]
        axes.set_title("Stand-in judge: these scores mean nothing" if judge == STAND_IN else f"Judge: {judge}")
    written(arguments.out)


if __name__ == "__main__":
    run(main)
