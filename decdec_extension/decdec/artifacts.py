"""The files that stages hand to each other: schema, write, read, and the check that they belong together.

A model folder is a Hugging Face folder whose ``config.json`` carries a ``quantization_config`` (:class:`QuantConfig`) and whose
safetensors hold, for each quantized linear layer ``NAME``, its packed base weights beside everything left unquantized:

* codebook: ``NAME.qweight``, ``NAME.codebook``, ``NAME.scale``
* uniform: ``NAME.qweight``, ``NAME.scales``, ``NAME.zeros``

With ``ordered`` there is ``NAME.order`` too, int32 ``(d_in,)``: packed input ``j`` is the layer's input ``order[j]``. All else,
residuals and thresholds included, stays in natural order.

Beside them lie ``cheatsheet.pt`` (the residuals), ``thresholds.pt`` (what calibration saw) and, if there is a static repair,
``repair.pt`` and ``cheatsheet_repaired.pt`` (the residuals of what it leaves), each
``{"format": ..., "version": 1, "config": {...}, "tensors": {...}}``, in natural order, one entry per linear layer, never fused.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from decdec.errors import UserError
from decdec.files import read_json, tensors_hash, write_torch
from decdec.packing import BASE_BITS, RESIDUAL_BITS, RESIDUAL_LAYOUT_VERSION, TILE_LAYOUT_VERSION
from decdec.reference import chunk_counts, residual_dequantize
from decdec.repair import LayerRepair, flatten, unflatten

QUANT_METHOD = "decdec"
FORMATS = ("codebook", "uniform")
CHEATSHEET = "cheatsheet.pt"
REPAIRED_CHEATSHEET = "cheatsheet_repaired.pt"
REPAIR = "repair.pt"
THRESHOLDS = "thresholds.pt"
STATISTICS = ("largest", "mean_square", "row_energy", "output_energy")  # of Thresholds, by their names in the file


@dataclass(frozen=True)
class QuantConfig:
    """How the base weights of a folder were made: ``config.json["quantization_config"]``."""

    method: str  # "awq", "squeezellm", "gptq", "rtn"
    format: str  # "codebook" or "uniform"
    bits: int
    group_size: int | None  # inputs that share a scale; None for codebooks
    base_model: str
    weights_hash: str  # over all packed tensors; artifacts of other weights are refused by it
    calibration: dict = field(default_factory=dict)
    layer_bits: dict[str, int] = field(default_factory=dict)  # layers whose bits differ from ``bits`` (3.5-bit models)
    dense: list[str] = field(default_factory=list)  # layers that were left unquantized, and are not compensated
    ordered: bool = False  # whether the packed weights of each layer take its inputs in an order of their own
    layout_version: int = TILE_LAYOUT_VERSION
    quant_method: str = QUANT_METHOD

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping, source: str = "quantization_config") -> "QuantConfig":
        if not isinstance(content, Mapping):
            raise UserError(f"{source}: quantization_config: expected an object, got {content!r}")
        if content.get("quant_method") != QUANT_METHOD:
            raise UserError(f"{source}: expected quant_method '{QUANT_METHOD}', got {content.get('quant_method')!r}")
        if content.get("layout_version") != TILE_LAYOUT_VERSION:
            raise UserError(f"{source}: expected layout_version {TILE_LAYOUT_VERSION}, got {content.get('layout_version')!r}")
        known = {f.name for f in fields(cls)}
        try:
            config = cls(**{key: value for key, value in content.items() if key in known})
        except TypeError as error:
            raise UserError(f"{source}: {error}") from None
        if config.format not in FORMATS:
            raise UserError(f"{source}: format: expected one of {', '.join(FORMATS)}, got {config.format!r}")
        for name, kind in (("layer_bits", dict), ("dense", list)):
            if not isinstance(value := getattr(config, name), kind):
                raise UserError(f"{source}: {name}: expected a {kind.__name__}, got {value!r}")
        size = config.group_size
        if size is not None and (type(size) is not int or size < 1):
            raise UserError(f"{source}: group_size: expected a positive integer or null, got {size!r}")
        for bits in (config.bits, *config.layer_bits.values()):
            if type(bits) is not int or bits not in BASE_BITS:
                raise UserError(f"{source}: bits: expected one of {BASE_BITS}, got {bits!r}")
        return config

    def bits_of(self, layer: str) -> int:
        return self.layer_bits.get(layer, self.bits)


def quant_method(folder: str | Path) -> str | None:
    """Who quantized the model in ``folder``, by its ``config.json``; None for an original."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected the configuration of a model, got {str(config)[:60]}")
    settings = config.get("quantization_config")
    if not settings:
        return None
    named = settings.get("quant_method") if isinstance(settings, dict) else None
    return named or "unknown"


def read_quant_config(folder: str | Path) -> QuantConfig:
    """The :class:`QuantConfig` of a model folder."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or "quantization_config" not in config:
        raise UserError(f"{path}: expected a model quantized by decdec_setup, got one without quantization_config")
    return QuantConfig.from_dict(config["quantization_config"], str(path))


@dataclass(frozen=True)
class Cheatsheet:
    """Residuals of all linear layers: ``residual[layer]`` uint8 rows, ``scale[layer]`` float16 ``(groups, d_out)`` or None.

    ``row_scale[layer]``, where there is one: float32 ``(d_in,)``, what the rows are multiplied with; one for all layers that read the
    same input.

    ``norms[layer]``, where known: the Frobenius norms of the original weight, of the residual, and of what the residual's own
    rounding leaves of it. ``repair``: the hash of the static repair whose remains these are, if any.
    """

    bits: int
    nested: bool
    residual: dict[str, Tensor]
    scale: dict[str, Tensor | None]
    norms: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    row_scale: dict[str, Tensor] = field(default_factory=dict)
    repair: str | None = None

    def dequantize(self, layer: str, d_out: int, device: str | torch.device = "cpu") -> Tensor:
        """The residual of ``layer`` that compensation adds, float32 ``(d_in, d_out)``."""
        scale = self.scale[layer]
        dense = residual_dequantize(self.residual[layer].to(device), None if scale is None else scale.to(device), self.bits,
                                    self.nested, d_out, torch.float32)
        return dense * self.row_scale[layer].to(device)[:, None] if layer in self.row_scale else dense


def save_cheatsheet(path: str | Path, sheet: Cheatsheet, quant: QuantConfig) -> None:
    tensors = {f"{layer}.residual": tensor for layer, tensor in sheet.residual.items()}
    tensors |= {f"{layer}.scale": tensor for layer, tensor in sheet.scale.items() if tensor is not None}
    tensors |= {f"{layer}.row_scale": tensor for layer, tensor in sheet.row_scale.items()}
    _save(path, "decdec.cheatsheet", tensors, {"bits": sheet.bits, "nested": sheet.nested,
                                               "layout_version": RESIDUAL_LAYOUT_VERSION, "base_model": quant.base_model,
                                               "weights_hash": quant.weights_hash, "norms": sheet.norms,
                                               "repair": sheet.repair})


def load_cheatsheet(path: str | Path, quant: QuantConfig) -> Cheatsheet:
    """Read ``cheatsheet.pt`` (memory-mapped) and refuse one made for other weights than ``quant`` describes."""
    config, tensors = _load(path, "decdec.cheatsheet", quant)
    if config.get("layout_version") != RESIDUAL_LAYOUT_VERSION:
        raise UserError(f"{path}: expected layout_version {RESIDUAL_LAYOUT_VERSION}, got {config.get('layout_version')!r}")
    if config.get("bits") not in RESIDUAL_BITS:
        raise UserError(f"{path}: bits: expected one of {RESIDUAL_BITS}, got {config.get('bits')!r}")
    residual = {name.removesuffix(".residual"): t for name, t in tensors.items() if name.endswith(".residual")}
    scale = {layer: tensors.get(f"{layer}.scale") for layer in residual}
    row_scale = {name.removesuffix(".row_scale"): t for name, t in tensors.items() if name.endswith(".row_scale")}
    return Cheatsheet(config["bits"], bool(config.get("nested")), residual, scale, config.get("norms", {}), row_scale,
                      config.get("repair"))


@dataclass(frozen=True)
class Repair:
    """``repair.pt``: the static repair of each layer that has one, as :mod:`decdec.repair` takes it, with float16 ``down``, ``up``
    and ``constant``. ``calibration``: what it was made with."""

    calibration: dict
    layers: dict[str, LayerRepair]

    @property
    def hash(self) -> str:
        return tensors_hash(sorted(flatten(self.layers).items()))


def save_repair(path: str | Path, repair: Repair, quant: QuantConfig) -> None:
    _save(path, "decdec.repair", flatten(repair.layers), {"calibration": repair.calibration, "base_model": quant.base_model,
                                                          "weights_hash": quant.weights_hash})


def load_repair(path: str | Path, quant: QuantConfig) -> Repair:
    config, tensors = _load(path, "decdec.repair", quant)
    return Repair(config.get("calibration", {}), unflatten(tensors))


@dataclass(frozen=True)
class Thresholds:
    """What calibration saw of each layer's input.

    ``largest[layer]``: float32 ``(d_in,)``, descending; entry r is the maximum over all tokens of the r-th largest ``|x|``.
    ``mean_square[layer]``: float32 ``(d_in,)``, mean of ``x**2`` of each channel: the static ranking of the paper's Figure 16.
    What predicts errors, where known: ``row_energy[layer]``, float32 ``(d_in,)``, the squared norm of each row of the residual,
    original minus quantized; ``output_energy[layer]``, float32 ``()``, the mean over tokens of the squared norm of ``W x``.
    """

    calibration: dict
    largest: dict[str, Tensor]
    mean_square: dict[str, Tensor]
    row_energy: dict[str, Tensor] = field(default_factory=dict)
    output_energy: dict[str, Tensor] = field(default_factory=dict)

    def boundaries(self, layer: str, k_chunk: int) -> tuple[float, float]:
        """``(b_0, b_15)`` for this layer and ``k_chunk`` >= 1: largest ``|x|``, and largest k-th largest ``|x|`` (section 4.3)."""
        seen = self.largest[layer]
        k = sum(chunk_counts(len(seen), k_chunk))
        return float(seen[0]), float(seen[k - 1])


def save_thresholds(path: str | Path, thresholds: Thresholds, quant: QuantConfig) -> None:
    tensors = {f"{layer}.{kind}": tensor for kind in STATISTICS for layer, tensor in getattr(thresholds, kind).items()}
    _save(path, "decdec.thresholds", tensors, {"calibration": thresholds.calibration, "base_model": quant.base_model,
                                               "weights_hash": quant.weights_hash})


def load_thresholds(path: str | Path, quant: QuantConfig) -> Thresholds:
    config, tensors = _load(path, "decdec.thresholds", quant)
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in STATISTICS}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind in found:
            found[kind][layer] = tensor
    return Thresholds(config.get("calibration", {}), **found)


def _save(path: str | Path, kind: str, tensors: Mapping[str, Tensor], config: dict) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_torch(path, {"format": kind, "version": 1, "config": config, "tensors": tensors})


def _load(path: str | Path, kind: str, quant: QuantConfig) -> tuple[dict, dict[str, Tensor]]:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; decdec_setup writes it")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for truncated, pickled or foreign files
        raise UserError(f"{path}: expected a {kind} file, got one that cannot be read "
                        f"({type(error).__name__}); make it again with decdec_setup") from None
    if not isinstance(content, dict) or content.get("format") != kind or content.get("version") != 1:
        raise UserError(f"{path}: expected format '{kind}' version 1, got another file")
    config, tensors = content.get("config"), content.get("tensors")
    if not isinstance(config, dict) or not isinstance(tensors, dict):
        raise UserError(f"{path}: expected a config and tensors, got {', '.join(content)}; make it again with decdec_setup")
    if config.get("weights_hash") != quant.weights_hash:
        raise UserError(f"{path}: made for weights {config.get('weights_hash')} of {config.get('base_model')}, "
                        f"but the folder's are {quant.weights_hash} of {quant.base_model}")
    return config, tensors
