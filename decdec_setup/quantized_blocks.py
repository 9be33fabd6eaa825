"""The weights of a folder made by quantize.py as the dense matrices they stand for."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from decdec import reference
from decdec.artifacts import read_quant_config
from decdec.errors import UserError

PARTS = {"codebook": ("qweight", "codebook", "scale"), "uniform": ("qweight", "scales", "zeros")}


class QuantizedBlocks:
    """A quantized folder, read tensor by tensor."""

    def __init__(self, folder: str | Path):
        self.folder, self.quant = Path(folder), read_quant_config(folder)
        self._dequantize = reference.codebook_dequantize if self.quant.format == "codebook" else reference.uniform_dequantize
        try:
            with safe_open(self.folder / "model.safetensors", framework="pt") as file:
                self._stored = set(file.keys())
        except (SafetensorError, FileNotFoundError) as error:
            raise UserError(f"{self.folder / 'model.safetensors'}: expected the packed weights of a model ({error})") from None

    def weight(self, layer: str, shape: tuple[int, int], device: str | torch.device = "cpu") -> Tensor:
        """The weight of ``layer``, float32, of the ``(d_out, d_in)`` that it has in the original."""
        if layer in self.quant.dense:
            return self._tensor(f"{layer}.weight").to(device, torch.float32)
        try:
            dense = self._dequantize(*self.parts(layer, device), shape[1], torch.float32)
            if self.quant.ordered:
                order = self._tensor(f"{layer}.order").to(device)
                dense = torch.empty_like(dense).index_copy_(1, order.long(), dense)
        except (ValueError, RuntimeError):  # from tensors that do not go together with these inputs
            dense = torch.empty(0)
        if dense.shape != shape:
            raise UserError(f"model: {layer} is {tuple(shape)} in the original and of another shape in {self.folder}; "
                            "give the model that was quantized")
        return dense

    def parts(self, layer: str, device: str | torch.device = "cpu") -> tuple[Tensor, ...]:
        """The packed tensors of ``layer``, in the order of PARTS."""
        return tuple(self._tensor(f"{layer}.{part}").to(device) for part in PARTS[self.quant.format])

    def load_into(self, block: nn.Module, name: str) -> nn.Module:
        """Give ``block``, a copy of the original's block ``name``, this folder's weights; AWQ's scaled norms are among them."""
        for key, value in block.state_dict().items():
            layer = f"{name}.{key}".removesuffix(".weight")
            packed = f"{layer}.qweight" in self._stored
            value.copy_(self.weight(layer, value.shape, value.device) if packed else self._tensor(f"{name}.{key}"))
        return block

    def _tensor(self, name: str) -> Tensor:
        try:
            # Opened each time: a file that stays open keeps every page that was read mapped, in the end all weights.
            with safe_open(self.folder / "model.safetensors", framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{self.folder}: expected the packed weights of this model ({error})") from None
