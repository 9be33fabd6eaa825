"""The compensated linear layer of this library: packed base weights, residual rows in CPU memory, ``o = (W_q + R ⊙ M(x)) x``."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from decdec import decode_ops, ops, packing
from decdec.compensated import Compensated, Compensation
from decdec.errors import UserError
from decdec.reference import CHUNK
from decdec.repair import join

# Up to this many rows the base GEMV ops beat dequantizing: SmolLM2's gate/up takes 0.59 instead of 0.98 ms of a CPU at 24 rows, and
# by three times what 8 rows take on an H100 the layers of a Llama-3-8B block would need 0.28 instead of 0.39 ms (3 bits).
BASE_ROWS = 24
FEW_ROWS = 8  # the same where each row fetches residuals of its own
# So many normed inputs and selected channels fit a fetching block on any GPU, those with 99 KB included (csrc/kernels/params.h).
NORMED = 17800


class CompensatedLinear(Compensated):
    """A linear layer of packed weights that can add back the residual of its salient input channels.

    ``packed`` holds ``qweight``, ``codebook``, ``scale`` or ``qweight``, ``scales``, ``zeros`` (layouts:
    :mod:`decdec.packing`, :mod:`decdec.ops`); they become buffers that follow ``.to(device)`` but keep their dtypes.
    ``order`` int32 ``(in_features,)``, if given, is the order in which the packed weights take the inputs (GPTQ's
    activation order); residual rows and thresholds are then given in it too.
    ``bias`` is ``(out_features,)``. The output has the input's dtype.
    """

    def __init__(self, name: str, in_features: int, packed: Mapping[str, Tensor], bias: Tensor | None = None,
                 parts: Sequence[tuple[str, int]] | None = None):
        self.format = "codebook" if "codebook" in packed else "uniform"
        out_features = packed["codebook"].shape[0] if self.format == "codebook" else packed["scales"].shape[1]
        super().__init__(name, in_features, out_features, parts)
        names = ("qweight", "codebook", "scale") if self.format == "codebook" else ("qweight", "scales", "zeros")
        for key in names:
            self.register_buffer(key, packed[key])
        self.register_buffer("bias", bias)
        if "order" in packed:
            self.register_buffer("order", packed["order"])
        else:
            self.order = None
        self._exact_dtypes = names
        self.bits = self.qweight.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the layer computes: where its weights are, or where accelerate brings offloaded ones for each call."""
        hooks = getattr(getattr(self, "_hf_hook", None), "hooks", None) or [getattr(self, "_hf_hook", None)]
        places = [place for hook in hooks if (place := getattr(hook, "execution_device", None)) is not None]
        return torch.device(places[0]) if places else self.qweight.device

    def extra_repr(self) -> str:
        return (f"{self.in_features}, {self.out_features}, {self.bits} bits {self.format}, "
                f"bias={self.bias is not None}, residual_bits={self.residual_bits}, {self.compensation}")

    def _apply(self, fn, recurse=True):
        before = {key: getattr(self, key) for key in self._exact_dtypes}
        super()._apply(fn, recurse)
        for key, tensor in before.items():
            moved = getattr(self, key)
            # .half() and the like: the packed form means what it says only in its own dtype.
            if moved.dtype != tensor.dtype:
                setattr(self, key, tensor.to(moved.device))
        return self

    def set_residual(self, residual: Tensor, scale: Tensor | None, bits: int, nested: bool,
                     row_scale: Tensor | None = None, repaired: bool = False) -> None:
        super().set_residual(residual, scale, bits, nested, row_scale, repaired)
        if nested and self.format == "uniform" and scale is not None and torch.equal(self.residual_scale, self.scales):
            self.residual_scale = self.scales  # the base's own, kept once

    def forward(self, x: Tensor) -> Tensor:
        rows = self._taken(x.reshape(x.numel() // self.in_features, self.in_features))
        compensated = self._compensates(x)
        few = 0 < rows.shape[0] <= (FEW_ROWS if compensated else BASE_ROWS)
        if few and not (torch.is_grad_enabled() and rows.requires_grad):  # the ops have no gradient
            out = self._by_gemv(rows, compensated, self.bias)
        else:
            out = self._by_matmul(rows, compensated)
        return out.reshape(*x.shape[:-1], self.out_features)

    def step(self, x: Tensor, stream: Tensor | None = None, norm: tuple[Tensor, float] | None = None) -> Tensor:
        """``stream + self(normed(x))`` of a decode step: ``stream`` ``(1, out_features)``, ``x`` ``(1, in_features)``.

        ``norm``: weight and epsilon of an RMSNorm of x. A layer without a bias adds the stream in its place, before the
        sum is rounded, and on a GPU most layers norm x themselves: some kernels less.
        """
        if norm is not None and not self._norms():
            x, norm = decode_ops.rms_norm(x, *norm), None
        beside = stream is not None and self.bias is not None
        bias = self.bias if stream is None or beside else stream.view(-1)
        out = self._by_gemv(self._taken(x), self.compensation.k_chunk > 0, bias, *(norm or (None, 0.0)))
        return stream + out if beside else out

    def _norms(self) -> bool:
        """Whether the ops can norm this layer's input themselves."""
        whole = self.in_features % 8 == 0 and self.compensation.selection in ("bucket", "exact")
        k_chunk = self.compensation.k_chunk
        whole = whole and (k_chunk == 0 or self.in_features * (1 + k_chunk / CHUNK) <= NORMED)
        if self.format == "uniform":
            whole = whole and self.in_features // len(self.scales) % 32 == 0 and self.out_features % 2 == 0
        repairs = self.compensation.repair and self.repair is not None  # which takes the normed x too
        return whole and not repairs and self.order is None and self.qweight.is_cuda

    def _taken(self, rows: Tensor) -> Tensor:
        """``rows`` with the inputs in the order of the packed weights."""
        return rows if self.order is None else rows.index_select(1, self.order)

    def selected_from(self, rows: Tensor) -> Tensor:
        """Inputs ``(n, in_features)`` as channels are selected from them: in the order of the packed weights and, where the static
        repair centers them, less the center."""
        rows = self._taken(rows)
        static = self._static(rows)
        near = None if static is None else static.near(rows)
        return rows if near is None else (rows - near * static.mean).to(rows.dtype)

    def _by_gemv(self, rows: Tensor, compensated: bool, bias: Tensor | None, norm: Tensor | None = None,
                 norm_eps: float = 0.0) -> Tensor:
        static = self._static(rows)
        if static is None:
            return self._product(rows, compensated, bias, norm=norm, norm_eps=norm_eps)
        near = static.near(rows)
        if near is None or not compensated:
            product = self._product(rows, compensated, bias)
        else:  # an op takes one center for all its rows
            product = torch.cat([self._product(row, True, bias, center)
                                 for row, center in zip(rows.split(1), near * static.mean)])
        return static.add_to(product, rows, near)

    def _product(self, rows: Tensor, compensated: bool, bias: Tensor | None, center: Tensor | None = None,
                 norm: Tensor | None = None, norm_eps: float = 0.0) -> Tensor:
        """``(W_q + R ⊙ M(x)) x + bias`` of a few rows, or without the residual; of that x less ``center``."""
        if not compensated:
            gemv = ops.codebook_gemv if self.format == "codebook" else ops.uniform_gemv
            return gemv(rows, *self._base(), bias, norm, norm_eps)
        if self.compensation.selection in ("bucket", "exact"):
            gemv = ops.codebook_gemv_compensated if self.format == "codebook" else ops.uniform_gemv_compensated
            return gemv(rows, *self._base(), bias, *self._residual(), self.compensation.k_chunk,
                        self.b_0, self.b_15, center, n_tb=self.compensation.n_tb, workspace=self.workspace,
                        norm=norm, norm_eps=norm_eps, row_scale=self.row_scale)
        return self._product(rows, False, bias) + self._product_of_few(rows, center)

    def _by_matmul(self, rows: Tensor, compensated: bool) -> Tensor:
        out = F.linear(rows, self._dense(rows.dtype), self.bias)
        static = self._static(rows)
        if static is not None:
            near = static.near(rows)
            out = static.add_to(out, rows, near)
            rows = rows if near is None else (rows - near * static.mean).to(rows.dtype)
        if compensated:
            self._add_product(rows, out)
        return out

    def _base(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(getattr(self, key) for key in self._exact_dtypes)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The base weights ``W_q`` as ``(out_features, in_features)`` in ``dtype``, the inputs in their natural order."""
        dense = self._dense(dtype)
        return dense if self.order is None else torch.empty_like(dense).index_copy_(1, self.order.long(), dense)

    def _dense(self, dtype: torch.dtype) -> Tensor:
        dequantize = ops.codebook_dequantize if self.format == "codebook" else ops.uniform_dequantize
        return dequantize(*self._base(), self.in_features, dtype)


def concatenate_residuals(residuals: Sequence[Tensor], widths: Sequence[int], bits: int) -> Tensor:
    """Residual rows of layers that share their input, side by side: the rows of the layer with all their outputs."""
    if bits == 3:  # its two parts, each by itself
        parts = [residual.split([packing.residual_row_bytes(width, 2), packing.residual_row_bytes(width, 1)], dim=1)
                 for residual, width in zip(residuals, widths)]
        return torch.cat([concatenate_residuals(part, widths, of) for part, of in zip(zip(*parts), (2, 1))], dim=1)
    if all(width * bits % (8 * packing.ROW_ALIGN) == 0 for width in widths[:-1]):
        return torch.cat(list(residuals), dim=1)
    codes = [packing.unpack_residual(residual, bits, width) for residual, width in zip(residuals, widths)]
    return packing.pack_residual(torch.cat(codes, dim=1), bits)


def _share(layers: Sequence[CompensatedLinear], what: str) -> bool:
    """Whether ``layers`` have the same tensor ``what``, or none of them has one."""
    first, *others = (getattr(layer, what) for layer in layers)
    return all((other is None) == (first is None) and (first is None or torch.equal(other, first)) for other in others)


def fuse(layers: Sequence[CompensatedLinear], name: str) -> CompensatedLinear:
    """One layer with the outputs of ``layers``, which share their input (q/k/v, gate/up), in their order."""
    first = layers[0]
    for what in ("in_features", "format", "bits", "residual_bits", "nested", "repaired", "compensation"):
        values = [getattr(layer, what) for layer in layers]
        if any(value != values[0] for value in values):
            raise UserError(f"{name}: cannot fuse layers whose {what} differ: {values}")
    widths = [layer.out_features for layer in layers]
    if all(width % packing.TILE_ROWS == 0 for width in widths[:-1]):
        packed = {"qweight": torch.cat([layer.qweight for layer in layers])}
    else:
        codes = [packing.unpack_codes(layer.qweight, layer.out_features, layer.in_features) for layer in layers]
        packed = {"qweight": packing.pack_codes(torch.cat(codes), first.bits)}
    if first.format == "codebook":
        packed |= {key: torch.cat([getattr(layer, key) for layer in layers]) for key in ("codebook", "scale")}
    else:
        if len({layer.scales.shape[0] for layer in layers}) > 1:
            raise UserError(f"{name}: cannot fuse layers of different group sizes")
        packed |= {key: torch.cat([getattr(layer, key) for layer in layers], dim=1) for key in ("scales", "zeros")}
    if not _share(layers, "order"):
        raise UserError(f"{name}: cannot fuse layers that take their inputs in different orders")
    if first.order is not None:
        packed["order"] = first.order
    bias = None
    if any(layer.bias is not None for layer in layers):
        given = next(layer.bias for layer in layers if layer.bias is not None)
        bias = torch.cat([given.new_zeros(layer.out_features) if layer.bias is None else layer.bias
                          for layer in layers])

    fused = CompensatedLinear(name, first.in_features, packed, bias, [part for layer in layers for part in layer.parts])
    if first.residual is not None:
        scale = None if first.residual_scale is None else torch.cat([layer.residual_scale for layer in layers], dim=1)
        rows = concatenate_residuals([layer.residual for layer in layers], widths, first.residual_bits)
        if not _share(layers, "row_scale"):
            raise UserError(f"{name}: cannot fuse layers whose residuals have different row scales; make the cheatsheet anew")
        fused.set_residual(rows, scale, first.residual_bits, first.nested, first.row_scale, first.repaired)
    fused.repair = join([layer.repair for layer in layers], widths, first.in_features)
    if first.thresholds is not None:  # one input, so one calibration
        fused.set_thresholds(first.thresholds.largest[first.name], first.thresholds.mean_square[first.name])
    fused.compensate(first.compensation)
    return fused
