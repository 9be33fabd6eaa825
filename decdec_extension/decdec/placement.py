"""Where residuals lie when their layers' weights are on a GPU: in pinned host memory, or in GPU memory."""

from collections import defaultdict
from collections.abc import Iterable

import torch

from decdec.compensated import Compensated
from decdec.errors import UserError
from decdec.linear import FEW_ROWS

PLACES = ("host", "gpu")


def check_place(where: str) -> None:
    if where not in PLACES:
        raise UserError(f"residuals: expected one of {', '.join(PLACES)}, got {where!r}")


def place_residuals(layers: Iterable[Compensated], where: str = "host") -> None:
    """Bring the residuals of ``layers`` to where the kernels of their weights' devices read them.

    On a GPU that is ``host``, one pinned arena for all layers of that GPU, or ``gpu``, its own memory. Residuals of
    layers on the CPU, and those already in place, stay. Layers of one GPU also share the zeroed workspace of their
    compensated GEMVs, so they must run one after another, on one stream. Raises UserError if the memory is not there.
    """
    check_place(where)
    groups: dict[torch.device, list[Compensated]] = defaultdict(list)
    for layer in layers:
        if layer.residual is not None and layer.device.type == "cuda" and (
                layer.workspace is None or layer.residual_in != where):
            groups[layer.device].append(layer)
    for device, group in groups.items():
        from decdec import arena  # it needs the CUDA ops

        moved = [layer for layer in group if layer.residual.device != device or layer.residual_in != where]
        rows = (layer.residual.cpu() for layer in moved)  # pinned rows name their GPU: a copy to it would be none
        try:
            placed = arena.pin(rows, device) if where == "host" else [residual.to(device) for residual in rows]
            size = max(arena.workspace_bytes(layer.out_features, FEW_ROWS) for layer in group)
            workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            gigabytes = sum(layer.residual.nbytes for layer in moved) / 1e9
            raise UserError(f"residuals: {gigabytes:.2f} GB do not fit the memory of {device}; place them in host memory") from None
        for layer, residual in zip(moved, placed):
            layer.residual, layer.residual_in = residual, where
        for layer in group:
            layer.workspace = workspace
