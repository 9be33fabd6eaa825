"""AWQ's scales, folded into the layers: kept as vectors, so that the scaled original can be rebuilt from the base model.

``scaling.safetensors`` holds, for modules whose weight was scaled, ``NAME.input_scale`` (``d_in`` columns) and
``NAME.output_scale`` (``d_out`` rows, or the channels of a norm), both float32: the scaled weight is
``output_scale[:, None] * W * input_scale[None, :]``, a bias is multiplied by ``output_scale``. A norm that multiplies by
``offset + weight`` has ``NAME.output_offset`` too: it is that sum which is scaled.
"""

from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# A larger ratio of residual to weight than rounding leaves: about 0.1 at 4 bits, 0.5 at 2; unrelated weights give 1.4.
TOO_FAR = 0.9
SCALING = "scaling.safetensors"
Entry = TypeVar("Entry")
_SUFFIXES = (".input_scale", ".output_scale", ".output_offset")


def split_scaling(tensors: dict[str, Entry]) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """``(the rest, the scale vectors)`` of a dict of tensors, or of what loads them."""
    scaling = {name: tensor for name, tensor in tensors.items() if name.endswith(_SUFFIXES)}
    return {name: tensor for name, tensor in tensors.items() if name not in scaling}, scaling


def read_scaling(folder: str | Path) -> dict[str, Tensor]:
    """The scale vectors of a quantized folder; none where the method does not scale."""
    path = Path(folder) / SCALING
    return load_file(path) if path.is_file() else {}


def scaled_state(name: str, tensor: Tensor, scaling: dict[str, Tensor]) -> Tensor:
    """The scaled form of the state-dict entry ``name``; in float32 if it is scaled, else the tensor itself."""
    module, _, kind = name.rpartition(".")
    rows = scaling.get(f"{module}.output_scale")
    columns = scaling.get(f"{module}.input_scale") if kind == "weight" else None
    if rows is None and columns is None:
        return tensor
    offset = float(scaling.get(f"{module}.output_offset", 0.0)) if kind == "weight" else 0.0
    return scaled(tensor.float(), *(vector if vector is None else vector.to(tensor.device) for vector in (rows, columns)), offset)


def scaled(tensor: Tensor, rows: Tensor | None, columns: Tensor | None, offset: float = 0.0) -> Tensor:
    """``tensor`` with its rows (of a vector: its entries, ``offset`` added meanwhile) and its columns multiplied, float32."""
    if rows is not None:
        tensor = (tensor + offset) * (rows[:, None] if tensor.dim() == 2 else rows) - offset
    return tensor if columns is None else tensor * columns


@torch.no_grad()
def scale_model(model: nn.Module, scaling: dict[str, Tensor]) -> nn.Module:
    """Turn the base model into the scaled original, in place: the same function, with the weights AWQ quantized."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.copy_(scaled_state(name, tensor, scaling))
    return model
