"""A quantized folder that another program wrote: which layers it quantized, read one at a time, and all the rest."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from decdec.errors import UserError
from decdec.files import open_safetensors, read_json, safetensors_names

from foreign_formats import FORMATS, ForeignLayer, check_settings


class ForeignFolder:
    """``layers``: the quantized linear layers by their names in the model; a mapping of what is stored by name."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json")
        self.settings = self.config.get("quantization_config")
        if self.settings is None and (self.folder / "quantize_config.json").is_file():  # AutoGPTQ's own file
            self.settings = {"quant_method": "gptq"} | read_json(self.folder / "quantize_config.json")
        if self.settings is None:
            raise UserError(f"{self.folder}: config.json: expected a quantization_config, got none: no quantized model")
        check_settings(self.settings, str(self.folder))
        self._format = FORMATS[self.settings["quant_method"]]
        self._files = self._open()
        self.model = self._skeleton()
        self.layers = self._quantized()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise UserError(f"{self.folder}: has no tensor {name}: an incomplete folder")
        try:
            return self._files[name].get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{self.folder}: {name} cannot be read ({error})") from None

    def layer(self, name: str) -> ForeignLayer:
        """The quantized layer ``name``."""
        linear = self.layers[name]
        try:
            layer = self._format.read(name, self, linear.out_features, linear.in_features, self.settings)
        except (RuntimeError, IndexError, KeyError) as error:  # tensors of other shapes than the format has
            raise UserError(f"{self.folder}: the tensors of {name} do not fit a layer of {linear.in_features} inputs "
                            f"and {linear.out_features} outputs ({str(error).splitlines()[0]})") from None
        shape, grid = (linear.out_features, linear.in_features), (linear.out_features, int(layer.group_of.max()) + 1)
        if layer.codes.shape != shape or layer.scales.shape != grid or layer.zeros.shape != grid:
            raise UserError(f"{self.folder}: {name}: expected codes {shape} on a grid {grid}, "
                            f"got {tuple(layer.codes.shape)} on {tuple(layer.scales.shape)}")
        if not bool(layer.scales.isfinite().all()):
            raise UserError(f"{self.folder}: {name}: expected finite scales, got NaN or Inf")
        return layer

    def rest(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor that belongs to no quantized layer, by its name in the model."""
        own = {f"{name}.{part}" for name in self.layers for part in self._format.own}
        known = set(self.model.state_dict())
        for name in self._files:
            if name in known and name not in own:
                yield name, self[name]
            elif name not in own and not self._is_idle(name):
                raise UserError(f"{self.folder}: tensor {name} fits nothing in {type(self.model).__name__}")
        self.model.tie_weights()
        state = self.model.state_dict(keep_vars=True)
        stored = {id(state[name]) for name in known if name in self._files}
        quantized = {f"{name}.weight" for name in self.layers}
        if lacking := [name for name in known - quantized if id(state[name]) not in stored]:
            raise UserError(f"{self.folder}: has no tensor {min(lacking)}: an incomplete folder")

    def _is_idle(self, name: str) -> bool:
        """Whether a tensor that the model has not is one that old releases stored for nothing."""
        layer, _, part = name.rpartition(".")
        return part == "inv_freq" or (part == "bias" and layer in self.layers and not bool(self[name].any()))

    def _open(self) -> dict[str, safe_open]:
        # AutoGPTQ and others call their one file as they like.
        names = safetensors_names(self.folder) or sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not names:
            raise UserError(f"{self.folder}: expected safetensors files, got none")
        files = {}
        for name in names:
            file = open_safetensors(self.folder / name)
            files |= dict.fromkeys(file.keys(), file)
        return files

    def _skeleton(self) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = copy.copy(AutoConfig.from_pretrained(self.folder))
            with contextlib.suppress(AttributeError):
                del config.quantization_config
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"{self.folder}: config.json: {str(error).splitlines()[0]}") from None

    def _quantized(self) -> dict[str, nn.Linear]:
        suffix = f".{self._format.key}"
        modules = dict(self.model.named_modules())
        layers = {}
        for stored in self._files:
            if stored.endswith(suffix):
                name = stored.removesuffix(suffix)
                if not isinstance(modules.get(name), nn.Linear):
                    raise UserError(f"{self.folder}: {name} is quantized, but no linear layer of "
                                    f"{type(self.model).__name__}")
                layers[name] = modules[name]
        if not layers:
            raise UserError(f"{self.folder}: expected tensors *{suffix} of {self.settings['quant_method']}, got none")
        return layers
