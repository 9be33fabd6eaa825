"""Table 3 of the paper: what the tuner chose for each GPU and target, and the slow-down it gave, from rows of tuned.py.

A cell reads n_tb / k_chunk for qkv, o, gate/up and down, then the slow-down. As in the paper the largest n_tb stands for all.
Where blocks differ, the cell has the range.
"""

import argparse

from series import bench_rows, label, markdown

from decdec.errors import run
from decdec.files import atomic


def many(value: int | list[int]) -> list[int]:
    """One value a block, or the one that all blocks share."""
    return value if isinstance(value, list) else [value]


def cell(row: dict) -> str:
    slow_down = row["predicted_percent"] if row["measured_percent"] is None else row["measured_percent"]
    chosen = ", ".join(f"{min(k)}-{max(k)}" if isinstance(k, list) else str(k) for k in row["k_chunk"].values())
    n_tb = max((max(many(row["n_tb"][kind])) for kind, k in row["k_chunk"].items() if any(many(k))), default=0)
    return f"{n_tb}/({chosen}) {slow_down:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="JSON-lines files written by tuned.py")
    parser.add_argument("--out", help="Markdown file to write as well")
    arguments = parser.parse_args()
    rows = [row for row in bench_rows(arguments.rows, "tuned", ("model",)) if row["target_percent"]]
    columns = sorted({label(row) for row in rows})
    places = dict.fromkeys((row["gpu"], row["timing"], row["scope"], row["target_percent"]) for row in rows)
    lines = []
    for gpu, timing, scope, target in places:
        here = {label(row): cell(row) for row in rows
                if (row["gpu"], row["timing"], row["scope"], row["target_percent"]) == (gpu, timing, scope, target)}
        lines.append((gpu, timing, f"{target:g} % {scope}", *(here.get(name, "-") for name in columns)))
    table = "\n".join(markdown(("GPU", "times", "target", *columns), lines)) + "\n"
    print(table, end="")
    if arguments.out:
        with atomic(arguments.out) as temporary:
            temporary.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    run(main)
