"""Static repair: what a layer adds for every token without fetching anything, kept beside the weights.

    o = W_q x + up (down x) + near(x) constant + sum over the selected i of (x_i - near(x) mean_i) R'_i

``up down`` is the part of the residual R = W - W_q of low rank that calibration found to matter most; the residual rows that are
fetched are those of what remains, R' = R - up down. ``mean`` is the layer's mean input and ``constant`` is R' mean: what remains
of the error that is the same for every token. ``near(x)`` is 1 where x is nearer to the mean than to zero and else 0: the inputs
of attention sinks, which the mean does not describe, are left alone, wherever they stand and without a layer knowing positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from decdec.errors import UserError


@dataclass(frozen=True)
class LayerRepair:
    """One layer's: ``down`` ``(rank, d_in)``, ``up`` ``(d_out, rank)``; where it is centred ``mean`` float32 ``(d_in,)`` and
    ``constant`` ``(d_out,)``. A rank of 0 is centring alone."""

    down: Tensor
    up: Tensor
    mean: Tensor | None = None
    constant: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> "LayerRepair":
        """On ``device``, for activations of ``dtype``; the mean stays float32, as the ops take it."""
        moved = {key: getattr(self, key).to(device, dtype) for key in ("down", "up")}
        if self.mean is not None:
            moved |= {"mean": self.mean.to(device), "constant": self.constant.to(device, dtype)}
        return replace(self, **moved)

    def reordered(self, order: Tensor) -> "LayerRepair":
        """For inputs taken in ``order``, int ``(d_in,)``."""
        return replace(self, down=self.down[:, order], mean=None if self.mean is None else self.mean[order])

    def near(self, rows: Tensor) -> Tensor | None:
        """Which of ``rows`` ``(n, d_in)`` are nearer to the mean than to zero, bool ``(n, 1)``; None of a layer not centred."""
        if self.mean is None:
            return None
        # Not as products with the mean, each of which would be one thread block's work on a GPU.
        return (torch.sub(rows, self.mean, alpha=0.5) * self.mean).sum(-1, keepdim=True) > 0

    def add_to(self, product: Tensor, rows: Tensor, near: Tensor | None) -> Tensor:
        """``product`` ``(n, d_out)``, which is written over, with the repair of ``rows``: two small products on a GPU."""
        product.addmm_(F.linear(rows, self.down), self.up.t())
        return product if near is None else product.add_(near * self.constant)

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.down, self.up, self.mean, self.constant) if tensor is not None]


def flatten(repairs: Mapping[str, LayerRepair]) -> dict[str, Tensor]:
    """The repairs of layers by name as ``LAYER.PART``: tensor."""
    return {f"{layer}.{part}": tensor for layer, repair in repairs.items() for part, tensor in vars(repair).items()
            if tensor is not None}


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, LayerRepair]:
    """What :func:`flatten` made of repairs, as repairs again."""
    layers = dict.fromkeys(name.removesuffix(".down") for name in tensors if name.endswith(".down"))
    return {layer: LayerRepair(*(tensors.get(f"{layer}.{part.name}") for part in fields(LayerRepair))) for layer in layers}


def join(repairs: Sequence[LayerRepair | None], widths: Sequence[int], d_in: int) -> LayerRepair | None:
    """The repair of the layer with the outputs of several that share their input, ``widths`` wide; None if none has one.

    Raises UserError unless all are centred with one mean, or none is: ``decdec_setup/repair.py`` decides for them together.
    """
    if not any(repairs):
        return None
    means = [None if repair is None else repair.mean for repair in repairs]
    if any((mean is None) != (means[0] is None) or (mean is not None and not torch.equal(mean, means[0])) for mean in means):
        raise UserError("repair: expected layers that share an input to have one mean; make it anew with repair.py")
    none = next(repair.down for repair in repairs if repair is not None).new_zeros((0, d_in))
    full = [repair or LayerRepair(none, none.new_zeros((width, 0))) for repair, width in zip(repairs, widths)]
    return LayerRepair(torch.cat([repair.down for repair in full]), torch.block_diag(*(repair.up for repair in full)), means[0],
                       None if means[0] is None else torch.cat([repair.constant for repair in full]))
