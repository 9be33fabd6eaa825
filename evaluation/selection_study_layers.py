"""Layers of the selection study: dense weights and residuals, so that any residual form and any choice of channels is a few lines."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decdec import hub, packing
from decdec.artifacts import Cheatsheet
from decdec.linear import CompensatedLinear
from decdec.reference import CHUNK, chunk_counts


@dataclass(frozen=True)
class Choice:
    """Which channels are compensated: ``k_chunk`` of every 1024 in chunks ``width`` wide (None: the whole vector is one chunk).

    ``shares`` cuts the chosen channels by rank: the first ``shares[0] * k_chunk`` of a chunk, the next ``shares[1] * k_chunk``, ...
    """

    k_chunk: int
    width: int | None = CHUNK
    shares: tuple[float, ...] = (1.0,)

    def counts(self, d_in: int) -> list[tuple[int, list[int]]]:
        """For every chunk its width and how many channels of each share are chosen, cumulated."""
        if self.width is None:
            return [(d_in, self._cumulated(sum(chunk_counts(d_in, self.k_chunk)), d_in))]
        widths = [min(self.width, d_in - start) for start in range(0, d_in, self.width)]
        return [(width, self._cumulated(-(-self.k_chunk * width // CHUNK), width)) for width in widths]

    def _cumulated(self, count: int, width: int) -> list[int]:
        return [min(width, round(count * sum(self.shares[:i + 1]))) for i in range(len(self.shares))]


class Chooser:
    """Cuts activations by rank of a score; layers that read the same input share the work."""

    def __init__(self) -> None:
        self._x = self._key = self._parts = None

    def cut(self, x: Tensor, score: Tensor, choice: Choice, key: object = None) -> list[Tensor]:
        """``x`` ``(..., d_in)`` once for every share, with the channels of all others set to 0. ``key`` None: shared with nobody."""
        if key is not None and self._x is x and self._key == (key, choice):
            return self._parts
        cut = [[] for _ in choice.shares]
        start = 0
        for width, counts in choice.counts(x.shape[-1]):
            part, of = x[..., start:start + width], score[..., start:start + width]
            largest = of.topk(counts[-1], dim=-1).indices
            for kept, first, end in zip(cut, (0, *counts), counts):
                chosen = largest[..., first:end]
                kept.append(torch.zeros_like(part).scatter_(-1, chosen, part.gather(-1, chosen)))
            start += width
        self._x, self._key, self._parts = x, (key, choice), [torch.cat(kept, dim=-1) for kept in cut]
        return self._parts


class StudyLinear(nn.Module):
    """A linear layer ``(W_q + repair) x + R mean + sum over shares of R_share (x - mean at its channels)``.

    ``exact`` is the residual ``W - W_q``, ``(d_out, d_in)``. :meth:`plain` undoes every setting but the base weights.
    """

    def __init__(self, layer: CompensatedLinear, exact: Tensor, chooser: Chooser, device: str, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.name, self.kind = layer.name, layer.kind
        self.weight = layer.dequantize(dtype).to(device)
        self.bias = None if layer.bias is None else layer.bias.to(device, dtype)
        self.exact = exact.to(device)
        self.scales = layer.scales.to(device) if layer.format == "uniform" else None
        self.codebook = None
        if layer.format == "codebook":
            self.codes = packing.unpack_codes(layer.qweight, layer.out_features, layer.in_features).to(device)
            self.codebook = (layer.codebook.float() * layer.scale[:, None]).to(device)
        self._chooser = chooser
        self.plain()

    def plain(self) -> None:
        self.repair: Tensor | None = None  # (d_out, d_in), static
        self.residuals: Sequence[Tensor] = ()  # (d_out, d_in) for every share
        self.choice = Choice(0)
        self.norms: Tensor | None = None  # (d_in,), weights of the ranking by |x|
        self.mean: Tensor | None = None  # (d_in,)

    @property
    def d_in(self) -> int:
        return self.weight.shape[1]

    @property
    def d_out(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``(batch, positions, d_in)``. A first position is not centred: it is the attention's sink, far from the mean."""
        out = F.linear(x, self.weight if self.repair is None else self.weight + self.repair.to(x.dtype), self.bias)
        shifted = x
        if self.mean is not None:
            later = torch.ones_like(x[:, :, :1]).index_fill_(1, torch.zeros(1, dtype=torch.long, device=x.device), 0)
            shifted = x - later * self.mean.to(x.dtype)
            out += later * (self.exact @ self.mean).to(x.dtype)
        if self.choice.k_chunk:
            score = shifted.abs() if self.norms is None else shifted.abs() * self.norms.to(x.dtype)
            shared = None if self.norms is not None or self.mean is not None else "|x|"
            for part, residual in zip(self._chooser.cut(shifted, score, self.choice, shared), self.residuals, strict=True):
                out += F.linear(part, residual)
        return out


def study_model(subject, sheet: Cheatsheet) -> tuple[nn.Module, dict[str, StudyLinear]]:
    """The model of a DecDEC folder with its layers replaced, and those by name; ``sheet`` holds 16-bit residuals."""
    dtype = getattr(torch, subject.dtype)
    model = hub.load(subject.source, dtype=dtype)
    chooser, layers = Chooser(), {}
    for name, layer in hub.compensated_layers(model).items():
        exact = packing.unpack_residual(sheet.residual[name], 16, layer.out_features).float().t()
        layers[name] = StudyLinear(layer, exact, chooser, subject.device, dtype)
        hub.replace(model, name, layers[name])
    return model.to(subject.device), layers
