"""Channels that one path of a model selects, given to another path of it.

Two paths that round otherwise select alike until two channels are nearly as large: then either may be the last to be
chosen, and from there on their logits differ by more than rounding. With the same channels they do not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from decdec import decode_ops, hub, ops
from decdec.linear import CompensatedLinear
from decdec.models import block_of
from decdec.reference import CHUNK

# What was selected of every input of one position, step by step: by block and kind of layer, int32 (1, k) on the CPU.
Selections = dict[tuple[int | None, str], list[Tensor]]


@dataclass
class Tips:
    """Selections given that are not a path's own: ``count`` of ``of``; ``widest`` is the largest difference between two
    channels that changed places, as a part of the larger one's magnitude."""

    count: int = 0
    of: int = 0
    widest: float = 0.0

    def add(self, magnitude: Tensor, own: Tensor, given: Tensor) -> None:
        """One more: ``own`` and ``given`` channels ``(k,)`` of inputs of these magnitudes ``(in_features,)``."""
        mine, theirs = (torch.zeros(len(magnitude), dtype=torch.bool).index_fill_(0, which[which >= 0].long(), True)
                        for which in (own, given))
        self.of += 1
        self.count += not torch.equal(mine, theirs)
        for size, left, taken in zip(*(whole.split(CHUNK) for whole in (magnitude, mine & ~theirs, theirs & ~mine))):
            if left.any():  # there may be fewer taken, where some are not finite
                self.widest = max(self.widest, 1 - float(min(size[taken], default=0) / size[left].max()))


@contextmanager
def recorded(model: nn.Module) -> Iterator[Selections]:
    """What layers of ``model`` select meanwhile."""
    selections: Selections = {}

    def watch(layer: CompensatedLinear, steps: list[Tensor], rows: Tensor, compensated: bool, bias: Tensor | None,
              center: Tensor | None = None, norm: Tensor | None = None, norm_eps: float = 0.0) -> Tensor:
        if compensated:
            normed = rows if norm is None else decode_ops.rms_norm(rows, norm, norm_eps)
            steps.append(layer.channels(normed, center).cpu())
        return CompensatedLinear._product(layer, rows, compensated, bias, center, norm, norm_eps)

    def taker(layer: CompensatedLinear) -> Callable | None:
        key = block_of(layer.name), layer.kind
        # Where q, k and v are apart, or gate and up, the first tells what all select.
        return None if key in selections else partial(watch, layer, selections.setdefault(key, []))

    with _products(model, taker):
        yield selections


@contextmanager
def replayed(model: nn.Module, selections: Selections) -> Iterator[Tips]:
    """Layers of ``model``, on the CPU, take these channels meanwhile instead of their own."""
    tips = Tips()

    def follow(layer: CompensatedLinear, steps: Iterator[Tensor], rows: Tensor, compensated: bool, bias: Tensor | None,
               center: Tensor | None = None, **_) -> Tensor:
        out = CompensatedLinear._product(layer, rows, False, bias)
        if not compensated:
            return out
        given = next(steps)
        magnitude = (rows if center is None else rows - center)[0].float().abs()
        tips.add(magnitude, layer.channels(rows, center)[0], given[0])
        return out + ops.residual_gemv(rows, given, *layer._residual(), layer.out_features, center, layer.row_scale)

    with _products(model, lambda layer: partial(follow, layer, iter(selections[block_of(layer.name), layer.kind]))):
        yield tips


@contextmanager
def _products(model: nn.Module, of: Callable[[CompensatedLinear], Callable | None]) -> Iterator[None]:
    """Every layer's product, once it has one here, is what ``of`` says meanwhile."""
    layers = [layer for layer in hub.compensated_layers(model).values() if isinstance(layer, CompensatedLinear)]
    changed = {layer: product for layer in layers if (product := of(layer))}
    for layer, product in changed.items():
        layer._product = product
    try:
        yield
    finally:
        for layer in changed:
            del layer._product
