"""The model that is quantized, read from its safetensors one block at a time.

A 70B model is larger than the memory that quantizing it should need. So the decoder's blocks stay on the meta device, and
:meth:`BaseModel.block` reads one when it is at work.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from decdec.artifacts import quant_method
from decdec.errors import UserError
from decdec.files import safetensors_names
from decdec.models import compute_buffers, decoder_blocks, decoder_linears, load_model


class _Stored(NamedTuple):
    """A tensor of a safetensors file; ``dtype`` by its name there."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


class BaseModel:
    """The causal LM in a Hugging Face folder.

    ``model`` is whole but for its blocks; ``tensor`` and ``block`` give the stored weights in the model's own dtype. A
    checkpoint whose names or shapes are not the model's own, or that is no safetensors, is loaded whole instead.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._stored: dict[str, _Stored] = {}
        self._state: dict[str, Tensor] | None = None
        if quant_method(self.folder):
            raise UserError(f"model: expected an original model, {str(folder)!r} is quantized")
        try:
            self._open()
            self.model = self._skeleton()
            streamed = self._fits()
        except (SafetensorError, OSError, ValueError, ImportError) as error:
            raise UserError(f"model: {str(folder)!r} could not be loaded: {str(error).splitlines()[0]}") from None
        if streamed:
            self._fill_rest()
        else:
            self.model = load_model(str(folder))
            self._state = self.model.state_dict()
        self.model.requires_grad_(False)
        self.prefix, self.blocks = decoder_blocks(self.model)
        check_dense(self.model)

    @classmethod
    def whole(cls, model: nn.Module) -> "BaseModel":
        """A model that is in memory already."""
        self = cls.__new__(cls)
        self.folder, self.model, self._state = None, model, model.state_dict()
        self.prefix, self.blocks = decoder_blocks(model)
        check_dense(model)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return next(self.blocks.parameters()).dtype

    def linears(self) -> dict[str, nn.Linear]:
        """The decoder's linear layers by name, for their shapes: their weights may be on the meta device."""
        return dict(decoder_linears(self.model))

    def tensor(self, name: str) -> Tensor:
        """The stored tensor ``name``, on the CPU."""
        if self._state is not None:
            return self._state[name]
        try:
            # Opened each time: a file that stays open keeps every page that was read mapped, in the end the whole model.
            with safe_open(self._stored[name].path, framework="pt") as file:
                tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"model: {self.folder}: {name} cannot be read ({error})") from None
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def block(self, index: int) -> dict[str, Tensor]:
        """The stored tensors of one block by their names within it."""
        return {name: self.tensor(f"{self.prefix}.{index}.{name}") for name in self.blocks[index].state_dict()}

    def outside(self) -> dict[str, Callable[[], Tensor]]:
        """What loads every stored tensor but the weights of the decoder's linear layers; a tied head is left out."""
        quantized = {f"{name}.weight" for name in self.linears()}
        kept, seen = {}, set()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if name not in quantized and id(tensor) not in seen:
                seen.add(id(tensor))
                kept[name] = partial(self.tensor, name)
        return kept

    def _open(self) -> None:
        for name in safetensors_names(self.folder):
            with safe_open(self.folder / name, framework="pt") as file:
                for key in file.keys():
                    part = file.get_slice(key)
                    self._stored[key] = _Stored(self.folder / name, tuple(part.get_shape()), part.get_dtype())

    def _skeleton(self) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(self.folder)
        first = next((stored.dtype for stored in self._stored.values()), None)
        stored = {"F16": torch.float16, "BF16": torch.bfloat16}.get(first, torch.float32)
        self._dtype = getattr(config, "dtype", None) or stored
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=self._dtype).eval()

    def _fits(self) -> bool:
        """Whether every tensor of the model is stored under its own name, tied ones once, and blocks compute no buffers."""
        self.model.tie_weights()
        stored = {id(tensor) for name, tensor in self.model.state_dict(keep_vars=True).items() if name in self._stored}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if name in self._stored:
                if self._stored[name].shape != tensor.shape:
                    return False
            elif id(tensor) not in stored:
                return False
        blocks = decoder_blocks(self.model)[1]
        return len(list(blocks.buffers())) == sum(name not in dict(blocks.named_parameters()) for name in blocks.state_dict())

    def _fill_rest(self) -> None:
        prefix, blocks = decoder_blocks(self.model)
        # Before the weights come: transformers initialises those of a module together with its buffers.
        compute_buffers(self.model)
        state = self.model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            if tensor.is_meta and name in self._stored and not name.startswith(f"{prefix}."):
                parent, _, leaf = name.rpartition(".")
                owner = self.model.get_submodule(parent)
                value = self.tensor(name)
                setattr(owner, leaf, nn.Parameter(value, requires_grad=False) if leaf in owner._parameters else value)
        self.model.tie_weights()


def check_dense(model: nn.Module) -> None:
    """Refuse mixtures of experts: weights stacked in three dimensions, or a list of linear layers inside a block."""
    prefix, blocks = decoder_blocks(model)
    for name, parameter in blocks.named_parameters():
        if parameter.dim() > 2:
            raise UserError(f"model: {prefix}.{name} stacks the weights of experts; mixtures of experts are not supported")
    for name, module in blocks.named_modules():
        if name and isinstance(module, nn.ModuleList) and any(isinstance(part, nn.Linear) for part in module.modules()):
            raise UserError(f"model: {prefix}.{name} is a list of expert layers; mixtures of experts are not supported")
