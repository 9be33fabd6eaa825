"""Residual forms of the selection study: each gives the residual that a form would fetch, dense, and what it keeps on the GPU.

Every form takes a layer, its bits, and the mean squares of the layer's inputs; it returns float32 ``(d_out, d_in)`` and the bytes
of scales or tables that it adds to GPU memory. ``target`` is the residual to be stored: the layer's own, or what a repair left.
"""

from collections.abc import Callable

import torch
from selection_study_layers import StudyLinear
from torch import Tensor

from decdec.residual import fit_interval, quantize_nested

Form = Callable[[StudyLinear, Tensor, int, Tensor], tuple[Tensor, int]]


def exact(layer: StudyLinear, target: Tensor, bits: int, energy: Tensor) -> tuple[Tensor, int]:
    return target.half().float(), 0


def paper(layer: StudyLinear, target: Tensor, bits: int, energy: Tensor) -> tuple[Tensor, int]:
    """A scale per output channel, levels ``-2**(bits-1)+1 .. 2**(bits-1)-1`` (section 4.2)."""
    top = 2 ** (bits - 1) - 1
    largest = target.abs().amax(1, keepdim=True) / top
    best, least = torch.zeros_like(target), torch.full_like(largest, torch.inf)
    for i in range(1, 33):
        scale = (largest * i / 32).clamp_min(1e-12)
        dense = torch.round(target / scale).clamp_(-top, top) * scale.half().float()
        error = (dense - target).square().mean(1, keepdim=True)
        best, least = torch.where(error < least, dense, best), torch.minimum(error, least)
    return best, 2 * layer.d_out


def _split(target: Tensor, width: Tensor, bits: int) -> Tensor:
    codes = quantize_nested(target, width, bits).float().unflatten(1, (len(width), -1))
    return ((codes + 0.5) * (width.float().t() / 2**bits)[:, :, None]).flatten(1)


def nested(layer: StudyLinear, target: Tensor, bits: int, energy: Tensor) -> tuple[Tensor, int]:
    """The step of the uniform base's own grid, split."""
    return _split(target, layer.scales, bits), 0


def fitted(layer: StudyLinear, target: Tensor, bits: int, energy: Tensor) -> tuple[Tensor, int]:
    """One interval per output channel, split."""
    return _split(target, fit_interval(target, bits), bits), 2 * layer.d_out


def groups_of_64(layer: StudyLinear, target: Tensor, bits: int, energy: Tensor) -> tuple[Tensor, int]:
    """An interval per output channel and 64 inputs, split."""
    groups = target.unflatten(1, (-1, 64))
    width = fit_interval(groups.flatten(0, 1), bits).view(groups.shape[:2]).t()
    return _split(target, width, bits), 2 * width.numel()


def _row_factor(target: Tensor) -> Tensor:
    """Root mean square of each input channel's residual, ``(d_in,)``."""
    return target.square().mean(0).sqrt().clamp_min(1e-12)


def row_scales(layer: StudyLinear, target: Tensor, bits: int, energy: Tensor) -> tuple[Tensor, int]:
    """A factor per input channel times an interval per output channel, split."""
    factor = _row_factor(target)
    return fitted(layer, target / factor, bits, energy)[0] * factor, 2 * layer.d_out + 4 * layer.d_in


def row_planes(layer: StudyLinear, target: Tensor, bits: int, energy: Tensor) -> tuple[Tensor, int]:
    """The same with the interval that fits best at 2 bits, split into more or fewer parts: what bit planes of one residual hold."""
    factor = _row_factor(target)
    even = target / factor
    return _split(even, fit_interval(even, 2), bits) * factor, 2 * layer.d_out + 4 * layer.d_in


def _tables(target: Tensor, entries: int, weight: Tensor) -> Tensor:
    """Free tables of ``entries`` levels per output channel by Lloyd's rounds on weighted squared error; the values they give."""
    quantiles = (torch.arange(entries, device=target.device) + 0.5) / entries
    table = target.quantile(quantiles, dim=1).t().contiguous()
    for _ in range(25):
        code = (target[:, :, None] - table[:, None, :]).abs().argmin(2)
        weights = weight.expand_as(target)
        total = torch.zeros_like(table).scatter_add_(1, code, weights)
        table = torch.where(total > 0, torch.zeros_like(table).scatter_add_(1, code, weights * target) / total, table)
    code = (target[:, :, None] - table[:, None, :]).abs().argmin(2)
    return table.half().float().gather(1, code)


def table(layer: StudyLinear, target: Tensor, bits: int, energy: Tensor) -> tuple[Tensor, int]:
    """A free table of levels per output channel."""
    return _tables(target, 2**bits, torch.ones_like(energy)), 2 * 2**bits * layer.d_out


def table_weighted(layer: StudyLinear, target: Tensor, bits: int, energy: Tensor) -> tuple[Tensor, int]:
    """The same, weighted by the inputs' mean squares."""
    return _tables(target, 2**bits, energy), 2 * 2**bits * layer.d_out


def cell(layer: StudyLinear, target: Tensor, bits: int, energy: Tensor) -> tuple[Tensor, int]:
    """The cell of the base codebook's own entry, split: a fetch would have to look the base code up."""
    entries, order = layer.codebook.sort(dim=1)
    rank = order.argsort(dim=1).gather(1, layer.codes.long())
    full = layer.weight + target
    middle = (entries[:, 1:] + entries[:, :-1]) / 2
    low = torch.cat([torch.minimum(full.amin(1, keepdim=True), entries[:, :1]), middle], dim=1).gather(1, rank)
    high = torch.cat([middle, torch.maximum(full.amax(1, keepdim=True), entries[:, -1:])], dim=1).gather(1, rank)
    step = (high - low).clamp_min(1e-12) / 2**bits
    code = ((full - low) / step).floor().clamp(0, 2**bits - 1)
    return low + (code + 0.5) * step - layer.weight, 0


FORMS: dict[str, Form] = {"exact": exact, "paper": paper, "nested": nested, "fitted": fitted, "groups of 64": groups_of_64,
                          "row scales": row_scales, "row planes": row_planes, "table": table, "weighted table": table_weighted,
                          "cell": cell}
