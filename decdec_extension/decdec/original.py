"""The file layouts of the paper's public artifact, read and written, so that either program can use the other's files.

Its ``cheatsheet.pt`` is a list with one dict a decoder block: for each linear layer, by its name inside the block,
``{"cheatsheet": int32 (d_in, d_out / 8), "reordered_scales": float16 (d_out,)}``. A word holds the codes plus 8 of eight
neighbouring outputs, lowest nibble first; the scale of output ``8 c + n`` stands at ``n * d_out / 8 + c``. Only 4-bit residuals
have this form. Its ``thresholds.pt`` is such a list too, with the vector of the largest ``|x|`` at each rank for each layer.
"""

from pathlib import Path

import torch
from torch import Tensor

from decdec.errors import UserError
from decdec.files import write_torch
from decdec.packing import pack_residual, unpack_residual

Blocks = list[dict[str, object]]


def save_original_cheatsheet(path: str | Path, residual: dict[str, Tensor], scale: dict[str, Tensor], prefix: str) -> None:
    """Write 4-bit residuals (row layout, ``scale[layer]`` ``(1, d_out)``) of layers named ``PREFIX.BLOCK.NAME``."""
    entries = {}
    for layer, rows in residual.items():
        d_out = scale[layer].shape[1]
        if d_out % 8:
            raise UserError(f"layout: the original's takes layers whose outputs are a multiple of 8; {layer} has {d_out}")
        nibbles = (unpack_residual(rows, 4, d_out).int() + 8).unflatten(1, (-1, 8))
        words = (nibbles << (4 * torch.arange(8, dtype=torch.int32))).sum(-1, dtype=torch.int32)
        entries[layer] = {"reordered_scales": scale[layer].view(-1, 8).t().flatten(), "cheatsheet": words}
    write_torch(path, _by_block(entries, prefix))


def load_original_cheatsheet(path: str | Path, prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``(residual, scale)`` of every layer, in the row layout and natural order, from the artifact's ``cheatsheet.pt``."""
    residual, scale = {}, {}
    for layer, entry in _by_layer(_load(path), prefix, path).items():
        if not isinstance(entry, dict) or not {"cheatsheet", "reordered_scales"} <= entry.keys():
            raise UserError(f"{path}: {layer}: expected 'cheatsheet' and 'reordered_scales'")
        words, reordered = entry["cheatsheet"], entry["reordered_scales"]
        if words.dim() != 2 or reordered.shape != (8 * words.shape[1],):
            raise UserError(f"{path}: {layer}: expected 8 scales a column of words, got {tuple(reordered.shape)} "
                            f"for {tuple(words.shape)}")
        nibbles = (words.long()[:, :, None] >> (4 * torch.arange(8))) & 0xF
        residual[layer] = pack_residual((nibbles - 8).flatten(1).to(torch.int8), 4)
        scale[layer] = reordered.half().view(8, -1).t().reshape(1, -1)
    return residual, scale


def save_original_thresholds(path: str | Path, largest: dict[str, Tensor], prefix: str) -> None:
    """Write ``largest[layer]``, float32 ``(d_in,)`` descending, of layers named ``PREFIX.BLOCK.NAME``."""
    write_torch(path, _by_block(dict(largest), prefix))


def load_original_thresholds(path: str | Path, prefix: str) -> dict[str, Tensor]:
    """``largest`` of every layer from the artifact's ``thresholds.pt``."""
    largest = _by_layer(_load(path), prefix, path)
    for layer, vector in largest.items():
        if not isinstance(vector, Tensor) or vector.dim() != 1:
            raise UserError(f"{path}: {layer}: expected a vector of thresholds")
    return {layer: vector.float() for layer, vector in largest.items()}


def _by_block(entries: dict[str, object], prefix: str) -> Blocks:
    blocks: dict[int, dict[str, object]] = {}
    for layer, entry in entries.items():
        number, _, name = layer.removeprefix(f"{prefix}.").partition(".")
        blocks.setdefault(int(number), {})[name] = entry
    return [blocks[index] for index in range(len(blocks))]


def _by_layer(blocks: Blocks, prefix: str, path: str | Path) -> dict:
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise UserError(f"{path}: expected the original artifact's list with one dict a block")
    return {f"{prefix}.{index}.{name}": entry for index, block in enumerate(blocks) for name, entry in block.items()}


def _load(path: str | Path) -> Blocks:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for truncated, pickled or foreign files
        raise UserError(f"{path}: expected the original artifact's file, got one that cannot be read "
                        f"({type(error).__name__})") from None
