"""Finds the scales that a quantizer folded into a model before it rounded it (AWQ, SmoothQuant): they are not stored.

A norm was divided by ``s`` and the columns of the layers behind it multiplied; or the rows of one layer divided and the
columns of the next multiplied. The first is read off the norm exactly. The second is estimated by least squares
from the quantized columns; being applied to both layers alike it leaves the function alone whatever its error, which
the residuals take up.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from base_model import BaseModel

# Rounding moves an estimated factor by about its relative error over the root of the summands: well below this, which
# is in turn well below what quantizers that scale do.
AGREE = 0.05


def find_scaling(base: BaseModel, block: int, stored: Mapping[str, Tensor],
                 dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scale vectors of one block, in the form of :mod:`scaling`; empty where nothing was folded.

    ``stored``: the quantized folder's own unquantized tensors by name; ``dense``: its weights of the block's layers.
    """
    prefix = f"{base.prefix}.{block}."
    original = {f"{prefix}{name}": tensor.float() for name, tensor in base.block(block).items()}
    layers = list(dense)
    weights = {name: (original[f"{name}.weight"], dense[name].float()) for name in layers}
    found: dict[str, Tensor] = {}
    columns = {name: _factors(*pair) for name, pair in weights.items()}
    for name, tensor in original.items():
        if tensor.dim() != 1 or not name.endswith(".weight") or name not in stored:
            continue
        for offset in (0.0, 1.0):  # norms that multiply by 1 + weight
            ratio = (stored[name].float() + offset) / (tensor + offset)
            behind = [layer for layer, factors in columns.items() if _cancel(factors, ratio)]
            if behind and _uneven(ratio):
                module = name.removesuffix(".weight")
                found[f"{module}.output_scale"] = ratio
                if offset:
                    found[f"{module}.output_offset"] = torch.tensor(offset)
                found |= {f"{layer}.input_scale": 1 / ratio for layer in behind}
                break
    for layer in layers:
        if f"{layer}.input_scale" in found or not _uneven(columns[layer]):
            continue
        for before in layers:
            rows = _factors(*(part.t() for part in weights[before]), found.get(f"{before}.input_scale"))
            scaled = rows[-len(columns[layer]):]  # of a fused layer the last outputs
            if before != layer and _cancel(scaled, columns[layer]):
                # A column that was rounded to nothing tells no factor; a small one serves.
                scale = columns[layer].clamp(min=0.01 * float(columns[layer].median()))
                found[f"{layer}.input_scale"] = scale
                found[f"{before}.output_scale"] = torch.cat((torch.ones(len(rows) - len(scaled)), 1 / scale))
                break
    return found


def _factors(original: Tensor, quantized: Tensor, rows: Tensor | None = None) -> Tensor:
    """The factor of each column that brings ``original``, its rows multiplied by ``rows``, nearest to ``quantized``."""
    if rows is not None:
        original = original * rows[:, None]
    return (original * quantized).sum(0) / original.square().sum(0).clamp(min=1e-30)


def _uneven(factors: Tensor) -> bool:
    """Whether factors differ among each other by more than rounding explains."""
    return bool((factors / factors.median() - 1).abs().median() > AGREE)


def _cancel(first: Tensor, second: Tensor) -> bool:
    """Whether two vectors of factors are each other's inverse, up to one number (rounding shrinks weights a little)."""
    return len(first) == len(second) and not _uneven(first * second)
