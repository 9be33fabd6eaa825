"""What a layer compensates, and a layer that can: its settings, residual, thresholds and selected channels."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decdec import ops, packing
from decdec.artifacts import Thresholds
from decdec.errors import UserError
from decdec.models import layer_kind
from decdec.reference import CHUNK, chunk_counts
from decdec.repair import LayerRepair

SELECTIONS = ("bucket", "exact", "static", "random")
# Rows compensated at once in prefill and evaluation: bounds the masked copy of x to this many rows.
ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Compensation:
    """What a layer compensates. The defaults compensate nothing.

    ``k_chunk``: channels in every 1024-wide chunk, 0..1024. ``selection``: ``bucket`` (the paper's), ``exact``,
    ``static`` (largest mean square in calibration, over the whole vector) or ``random`` (without replacement in each
    chunk, from ``seed``): the four of the paper's Figure 16. ``prefill``: also compensate inputs of several positions,
    each position on its own channels. ``n_tb``: thread blocks that fetch on a GPU. ``repair``: apply the folder's static
    repair (:mod:`decdec.repair`), to every input and at any ``k_chunk``, and fetch the residuals of what it leaves.
    """

    k_chunk: int = 0
    selection: str = "bucket"
    prefill: bool = False
    n_tb: int = 8
    seed: int = 0
    repair: bool = False

    def __post_init__(self):
        if not isinstance(self.k_chunk, int) or not 0 <= self.k_chunk <= CHUNK:
            raise UserError(f"k_chunk: expected an integer in 0..{CHUNK}, got {self.k_chunk!r}")
        if self.selection not in SELECTIONS:
            raise UserError(f"selection: expected one of {', '.join(SELECTIONS)}, got {self.selection!r}")
        if not isinstance(self.n_tb, int) or self.n_tb < 1:
            raise UserError(f"n_tb: expected a positive integer, got {self.n_tb!r}")


class Compensated(nn.Module):
    """The residual of a linear layer and what is to be added back of it: what every compensated layer has.

    Residual rows and what goes with them are plain attributes that follow the layer's weights: no ``state_dict`` holds
    them, and ``.to()`` a GPU pins the rows in host memory (:mod:`decdec.placement`;
    :func:`decdec.hub.set_compensation` pins those of all layers at once). ``parts`` are the names and widths of the
    layers fused into this one.

    An input ``(..., positions, in_features)`` with one position is a decode step and is compensated; one with more is
    prefill and is compensated only if ``compensation.prefill``.
    """

    def __init__(self, name: str, in_features: int, out_features: int, parts: Sequence[tuple[str, int]] | None = None):
        super().__init__()
        self.name, self.kind, self.in_features, self.out_features = name, layer_kind(name), in_features, out_features
        self.parts = tuple(parts or [(name, out_features)])
        self.residual_scale: Tensor | None = None
        self.row_scale: Tensor | None = None
        self.static_channels: Tensor | None = None
        self.residual: Tensor | None = None
        self.residual_in, self.workspace = "host", None
        self.residual_bits, self.nested, self.repaired = 0, False, False
        self.repair: LayerRepair | None = None
        self.thresholds: Thresholds | None = None
        self.compensate(Compensation())

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for key in ("residual_scale", "row_scale", "static_channels"):
            if getattr(self, key) is not None:
                setattr(self, key, getattr(self, key).to(self.device))
        if self.residual is not None and self.residual.device != self.device:
            self.workspace = None
            if self.device.type == "cuda":
                from decdec.placement import place_residuals  # which knows this class

                place_residuals([self], self.residual_in)
            elif self.device.type == "cpu":
                self.residual = self.residual.cpu()
        return self

    def set_residual(self, residual: Tensor, scale: Tensor | None, bits: int, nested: bool,
                     row_scale: Tensor | None = None, repaired: bool = False) -> None:
        """Take the residual: uint8 rows ``(in_features, row_bytes)``, float16 ``scale`` ``(groups, out_features)``, and float32
        ``(in_features,)`` that the rows are multiplied with, if any. ``repaired``: it is that of what the static repair leaves."""
        expected = (self.in_features, packing.residual_row_bytes(self.out_features, bits))
        if residual.shape != expected or (scale is not None and scale.shape[1] != self.out_features):
            raise UserError(f"layer {self.name}: residual: expected shape {expected}, got {tuple(residual.shape)}: "
                            "a cheatsheet of another model")
        self.residual, self.residual_bits, self.nested, self.repaired, self.workspace = residual, bits, nested, repaired, None
        self.residual_scale = None if scale is None else scale.to(self.device)
        self.row_scale = None if row_scale is None else row_scale.to(self.device)

    def set_thresholds(self, largest: Tensor, mean_square: Tensor) -> None:
        """Take what calibration saw of the input, each float32 ``(in_features,)`` (see ``artifacts.Thresholds``)."""
        if largest.shape != (self.in_features,) or mean_square.shape != (self.in_features,):
            raise UserError(f"layer {self.name}: thresholds: expected {self.in_features} channels, "
                            f"got {tuple(largest.shape)}: thresholds of another model")
        self.thresholds = Thresholds({}, {self.name: largest}, {self.name: mean_square})

    def compensate(self, compensation: Compensation) -> None:
        """Take new settings; ``k_chunk`` above 0 needs the residual, ``bucket`` and ``static`` the thresholds too."""
        b_0 = b_15 = static_channels = generator = None
        k_chunk, selection = compensation.k_chunk, compensation.selection
        if k_chunk:
            if self.residual is None:
                raise UserError(f"layer {self.name}: k_chunk {k_chunk} needs the residual (cheatsheet.pt), not loaded")
            if self.repaired != compensation.repair:
                raise UserError(f"layer {self.name}: repair {compensation.repair} needs residuals made "
                                f"{'with' if compensation.repair else 'without'} --repaired, others are loaded")
            if selection in ("bucket", "static") and self.thresholds is None:
                raise UserError(f"layer {self.name}: {selection} selection needs thresholds.pt, none are loaded")
            if selection == "bucket":
                b_0, b_15 = self.thresholds.boundaries(self.name, k_chunk)
            elif selection == "static":
                order = torch.sort(self.thresholds.mean_square[self.name], descending=True, stable=True).indices
                best = order[:sum(chunk_counts(self.in_features, k_chunk))].sort().values
                static_channels = best.to(torch.int32).to(self.device)
            elif selection == "random":
                # Layers draw apart from each other, and alike in every run on one kind of device.
                seed = compensation.seed + zlib.crc32(self.name.encode())
                generator = torch.Generator(self.device).manual_seed(seed)
        self.b_0, self.b_15, self.static_channels, self.generator = b_0, b_15, static_channels, generator
        self.compensation = compensation

    def _compensates(self, x: Tensor) -> bool:
        """Whether the input ``(..., positions, in_features)`` is to be compensated."""
        return self.compensation.k_chunk > 0 and (x.dim() < 2 or x.shape[-2] == 1 or self.compensation.prefill)

    def _static(self, rows: Tensor) -> LayerRepair | None:
        """The static repair, if it is in use, where ``rows`` are and in their dtype."""
        if self.repair is None or not self.compensation.repair:
            return None
        if self.repair.down.dtype != rows.dtype or self.repair.down.device != rows.device:
            self.repair = self.repair.to(rows.device, rows.dtype)
        return self.repair

    def channels(self, rows: Tensor, center: Tensor | None = None) -> Tensor:
        """Channels to compensate of ``rows`` in the packed weights' order, int32 ``(rows, k)``, -1 where a chunk has too
        few finite values; by ``rows`` less ``center``, float32 ``(in_features,)``."""
        setting = self.compensation
        if setting.selection == "static":
            return self.static_channels.expand(len(rows), -1).contiguous()
        if setting.selection == "random":
            chosen = []
            for chunk, count in enumerate(chunk_counts(self.in_features, setting.k_chunk)):
                width = min(CHUNK, self.in_features - chunk * CHUNK)
                draw = torch.rand((len(rows), width), generator=self.generator, device=self.generator.device)
                drawn = draw.topk(count, dim=1).indices
                chosen.append(drawn.sort(dim=1).values + chunk * CHUNK)
            return torch.cat(chosen, dim=1).to(torch.int32).to(rows.device)
        return ops.select_channels(rows, setting.k_chunk, self.b_0, self.b_15, center)

    def _salient(self, rows: Tensor) -> Tensor:
        """``rows`` with every channel but the selected ones set to 0."""
        channels = self.channels(rows)
        spill = torch.where(channels < 0, self.in_features, channels).long()  # -1 goes to a column that is dropped
        kept = torch.zeros((len(rows), self.in_features + 1), dtype=torch.bool, device=rows.device)
        return torch.where(kept.scatter_(1, spill, True)[:, :-1], rows, 0)

    def _residual(self) -> tuple[Tensor, Tensor | None, int, bool]:
        return self.residual, self.residual_scale, self.residual_bits, self.nested

    def _product_of_few(self, rows: Tensor, center: Tensor | None = None) -> Tensor:
        """``(R ⊙ M(x)) x`` of a few rows, of ``x`` less ``center``."""
        return ops.residual_gemv(rows, self.channels(rows, center), *self._residual(), self.out_features, center, self.row_scale)

    def _add_product(self, rows: Tensor, out: Tensor) -> None:
        """Add ``(R ⊙ M(x)) x`` of many rows to ``out``."""
        residual = ops.residual_dequantize(*self._residual(), self.out_features, rows.dtype)
        if self.row_scale is not None:
            residual *= self.row_scale[:, None]
        for part, part_out in zip(rows.split(ROWS_AT_ONCE), out.split(ROWS_AT_ONCE)):
            part_out += self._salient(part) @ residual
