"""Prints, of some DecDEC folders, those with the fewest bits, one a line: the paper looks closer at its 3-bit models only."""

import argparse

from decdec.artifacts import read_quant_config
from decdec.errors import run


def mean_bits(folder: str) -> float:
    quant = read_quant_config(folder)
    widths = {quant.bits, *quant.layer_bits.values()}
    return sum(widths) / len(widths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="made by decdec_setup")
    folders = parser.parse_args().folders
    bits = [mean_bits(folder) for folder in folders]
    print("\n".join(folder for folder, width in zip(folders, bits, strict=True) if width == min(bits)))


if __name__ == "__main__":
    run(main)
