"""Prints where a DecDEC folder has its residuals of some bits in the paper's form: cheatsheet.pt if it holds them, else
residual_BITS.pt, whether it is there or not."""

import argparse
from pathlib import Path

from decdec.artifacts import CHEATSHEET, load_cheatsheet, read_quant_config
from decdec.errors import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="made by decdec_setup")
    parser.add_argument("bits", metavar="BITS", type=int)
    arguments = parser.parse_args()
    path = Path(arguments.folder) / CHEATSHEET
    if path.is_file():
        sheet = load_cheatsheet(path, read_quant_config(arguments.folder))
        if (sheet.bits, sheet.nested, sheet.repair) == (arguments.bits, False, None):
            print(path)
            return
    print(path.with_name(f"residual_{arguments.bits}.pt"))


if __name__ == "__main__":
    run(main)
