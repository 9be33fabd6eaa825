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

def find_scaling(base: BaseModel, block: int, stored: Mapping[str, Tensor],
                 dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scale vectors of one block, in the form of :mod:`scaling`; empty where nothing was folded.

    ``stored``: the quantized folder's own unquantized tensors by name; ``dense``: its weights of the block's layers.
    """
    prefix = f"{base.prefix}.{block}."
    original = {f"{prefix}{name}": tensor.float() for name, tensor in base.block(block).items()}
    weights = {name: (original[f"{name}.weight"], weight.float()) for name, weight in dense.items()}
    columns = {name: _factors(*pair) for name, pair in weights.items()}
    # Some norms multiply by 1 + weight; the offset that explains the columns better holds for all norms of the block.
    _, offset, found = min((_behind_norms(columns, original, stored, offset) for offset in (0.0, 1.0)),
                           key=lambda match: match[0])
    if offset:
        norms = [key.removesuffix(".output_scale") for key in found if key.endswith(".output_scale")]
        found |= {f"{norm}.output_offset": torch.tensor(offset) for norm in norms}
    for layer, factors in columns.items():
        if f"{layer}.input_scale" in found:
            continue
        for before in weights.keys() - {layer}:
            rows = _factors(*(part.t() for part in weights[before]), found.get(f"{before}.input_scale"))
            scaled = rows[-len(factors):]  # of a fused layer the last outputs
            if len(scaled) == len(factors) and _spread(scaled * factors) < min(_spread(factors), _spread(scaled)):
                # A column that was rounded to nothing tells no factor; a small one serves.
                scale = factors.clamp(min=0.01 * float(factors.median()))
                found[f"{layer}.input_scale"] = scale
                found[f"{before}.output_scale"] = torch.cat((torch.ones(len(rows) - len(scaled)), 1 / scale))
                break
    return found


def _behind_norms(columns: Mapping[str, Tensor], original: Mapping[str, Tensor], stored: Mapping[str, Tensor],
                  offset: float) -> tuple[float, float, dict[str, Tensor]]:
    """What the columns are left with when each layer is put behind the norm that explains it best, if any; ``offset``;
    the scales of norms and layers."""
    ratios = {name.removesuffix(".weight"): (stored[name].float() + offset) / (weight + offset)
              for name, weight in original.items() if weight.dim() == 1 and name.endswith(".weight") and name in stored
              and not torch.equal(stored[name].float(), weight)}
    left, found = 0.0, {}
    for layer, factors in columns.items():
        options = [(_spread(factors), None), *((_spread(factors * ratio), norm) for norm, ratio in ratios.items()
                                               if len(ratio) == len(factors))]
        spread, norm = min(options, key=lambda option: option[0])
        left += spread
        if norm is not None:
            found |= {f"{layer}.input_scale": 1 / ratios[norm], f"{norm}.output_scale": ratios[norm]}
    return left, offset, found


def _factors(original: Tensor, quantized: Tensor, rows: Tensor | None = None) -> Tensor:
    """The factor of each column that brings ``original``, its rows multiplied by ``rows``, nearest to ``quantized``."""
    if rows is not None:
        original = original * rows[:, None]
    return (original * quantized).sum(0) / original.square().sum(0).clamp(min=1e-30)


def _spread(factors: Tensor) -> float:
    """Mean distance of the factors' logarithms from their median: what is left when two sets of factors cancel is what
    rounding did to them, and less than either."""
    logarithms = factors.clamp(min=1e-3 * float(factors.abs().median())).log()
    return float((logarithms - logarithms.median()).abs().mean())
