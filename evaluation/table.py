"""Print the rows of perplexity.py as a table: one line a setting, full precision last."""

import argparse

from decdec.errors import UserError, run
from decdec.files import read_rows

HEADER = ("method", "bits", "selection", "k_chunk", "perplexity", "device MB", "host MB", "residual", "repair")


def cells(row: dict) -> tuple[str, ...]:
    residual = f"{row['residual_bits']} bits{' nested' if row['nested'] else ''}" if row["k_chunk"] else "-"
    repair = row.get("repair_settings")
    repaired = f"rank {repair['rank']}, center {repair['center']}" if repair else "-"
    return (row["method"], str(row["bits"]), row["selection"], str(row["k_chunk"]), f"{row['perplexity']:.2f}",
            f"{row['device_bytes'] / 1e6:.1f}", f"{row['host_bytes'] / 1e6:.1f}", residual, repaired)


def table(rows: list[dict]) -> list[str]:
    """Lines of a table for every text and its windows: what was measured, the header, one line a row."""
    groups = {}
    for row in rows:
        title = f"{row['model']} on {row['text']}, {row['windows']} windows of {row['window_length']} tokens"
        groups.setdefault(title, []).append(row)
    return [line for title, group in groups.items() for line in ["", title, *_lines(group)]][1:]


def _lines(rows: list[dict]) -> list[str]:
    rows = sorted(rows, key=lambda row: (row["method"] == "original", row["method"], str(row["bits"]), row["selection"] != "none",
                                         row["selection"], row["k_chunk"], str(row["nested"]), str(row.get("repair"))))
    lines = [HEADER, *map(cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    padded = ["  ".join(cell.ljust(width) if column in (0, 2, 7, 8) else cell.rjust(width)
                        for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip() for line in lines]
    return [padded[0], "  ".join("-" * width for width in widths), *padded[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", help="JSON-lines file written by perplexity.py")
    arguments = parser.parse_args()
    rows = [row for row in read_rows(arguments.rows) if row.get("bench") == "perplexity"]
    if not rows:
        raise UserError(f"{arguments.rows}: no perplexity rows")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    run(main)
