"""The bits of every decoder block of a model between two bit widths, as a JSON file.

``{"format": "decdec.bit_map", "version": 1, "bits": [4, 3, ...]}``, and what the choice rests on.
"""

from math import ceil, floor
from pathlib import Path

from decdec.errors import UserError
from decdec.files import read_json, write_json
from decdec.packing import BASE_BITS
from decdec.text import calibration_identity

FORMAT, VERSION = "decdec.bit_map", 1


def write_bit_map(path: str | Path, bits: list[int], how: dict) -> None:
    """Write the bits of the blocks, first to last; ``how`` says what they rest on."""
    write_json(path, {"format": FORMAT, "version": VERSION, "bits": bits} | how)


def known_bit_map(path: str | Path, how: dict) -> list[int] | None:
    """The bits that the map at ``path`` holds, if it rests on just that; else None."""
    content = read_json(path) if Path(path).is_file() else {}
    if not isinstance(content, dict) or not isinstance(content.get("calibration"), dict):
        return None
    content["calibration"] = calibration_identity(content["calibration"])  # which once held the text's name
    return content.get("bits") if all(content.get(key) == value for key, value in how.items()) else None


def read_bit_map(path: str | Path, bits: float) -> list[int]:
    """The bits of the blocks; those of a model of ``bits`` bits are the whole numbers next to it."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        raise UserError(f"bit-map: {path}: expected format '{FORMAT}' version {VERSION}, as mixed_precision.py writes it")
    allowed = {floor(bits), ceil(bits)} & set(BASE_BITS)
    blocks = content.get("bits")
    if not isinstance(blocks, list) or not blocks or len(allowed) < 2 or set(blocks) - allowed:
        raise UserError(f"bit-map: {path}: expected blocks of the two bit widths next to {bits:g}, got {blocks!r:.60}")
    return blocks
