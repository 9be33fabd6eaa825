"""Rows of a profile, or of --rows of tuner.py, as CSV on stdout; a column for every field that any row has."""

import argparse
import csv
import sys
from pathlib import Path

from decdec.errors import UserError, run
from decdec.files import read_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", help="JSON-lines file")
    parser.add_argument("--what", help="only rows of this kind: timing or rates")
    arguments = parser.parse_args()
    if not Path(arguments.rows).is_file():
        raise UserError(f"rows: {arguments.rows}: no such file")
    rows = read_rows(arguments.rows)
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"rows: {arguments.rows}: expected JSON objects, one a line")
    rows = [row for row in rows if arguments.what in (None, row.get("what"))]
    if not rows:
        raise UserError(f"rows: {arguments.rows}: has no rows" + f" of kind {arguments.what}" * bool(arguments.what))
    writer = csv.DictWriter(sys.stdout, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    run(main)
