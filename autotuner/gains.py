"""What fetching is worth: predicted loss removed by compensating k_chunk channels, for each kind of layer.

Of a folder there are two sources, the better one first:

* ``gains.safetensors``, written into the model folder by measure_gains.py from gradients of the loss. In nats per
  token.
* ``thresholds.pt`` alone: fetching channel c removes about ``x_c^2 |R_c|^2`` of a layer's squared output error (errors
  of different channels taken as independent), which is estimated from the largest |x| at each rank. As a
  fraction of the layer's squared output; layers count alike.

Random weights have neither: their inputs are taken as standard normal (:func:`of_normal_inputs`), and layers count
alike.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from shapes import Layer
from torch import Tensor

from decdec import artifacts
from decdec.artifacts import Cheatsheet, QuantConfig, Thresholds
from decdec.errors import UserError
from decdec.files import config_hash, open_safetensors, tensors_hash
from decdec.models import block_of, layer_kind
from decdec.reference import CHUNK, chunk_counts

GAINS = "gains.safetensors"
MEASURED, DERIVED = "nats per token", "fraction of squared output"
NORMAL = "fraction of squared error, inputs standard normal"


def read_gains(folder: str | Path, layers: Iterable[Layer]) -> tuple[dict[Layer, Tensor], str] | None:
    """For each layer its gain at k_chunk 0..1024, float64 ``(1025,)``, summed over the model, and the unit; None
    without data."""
    folder = Path(folder)
    quant = artifacts.read_quant_config(folder)
    if (folder / GAINS).is_file():
        sheet = folder / artifacts.CHEATSHEET
        by_name = _measured(folder / GAINS, quant, artifacts.load_cheatsheet(sheet, quant) if sheet.is_file() else None)
        unit = MEASURED
    elif (folder / artifacts.THRESHOLDS).is_file():
        by_name, unit = _derived(artifacts.load_thresholds(folder / artifacts.THRESHOLDS, quant)), DERIVED
    else:
        by_name = None
    if not by_name:
        return None
    layers = list(layers)
    each_block = any(layer.block is not None for layer in layers)
    summed = {(layer.kind, layer.bits, layer.block): torch.zeros(CHUNK + 1, dtype=torch.float64) for layer in layers}
    for name, gain in by_name.items():
        key = layer_kind(name), quant.bits_of(name), block_of(name) if each_block else None
        if key not in summed:
            raise UserError(f"{folder}: gains: {name} is no layer of this model")
        summed[key] += gain.double()
    return {layer: diminishing(summed[layer.kind, layer.bits, layer.block]) for layer in layers}, unit


def of_normal_inputs(layers: Iterable[Layer]) -> dict[Layer, Tensor]:
    """The gains where nothing is known of a layer: the share of its squared error that the largest of standard normal
    inputs carry."""
    tail = (torch.arange(CHUNK, dtype=torch.float64) + 0.5) / (2 * CHUNK)
    carried = torch.special.ndtri(tail).square()
    gain = torch.cat([torch.zeros(1, dtype=torch.float64), carried.cumsum(0) / carried.sum()])
    return {layer: layer.count * gain for layer in layers}


def diminishing(gain: Tensor) -> Tensor:
    """The nearest curve whose returns diminish, and never turn negative: float64 ``(1025,)``, 0 at k_chunk 0.

    Ranks are in order of |x|, so true returns fall; where measured ones rise it is noise, and a tuner would chase it.
    Adjacent returns that rise are pooled into their mean until none do, which is the least-squares fit of falling
    returns.
    """
    pools: list[tuple[float, int]] = []  # (sum of returns, how many)
    for value in gain.diff().tolist():
        pool = value, 1
        while pools and pools[-1][0] / pools[-1][1] <= pool[0] / pool[1]:
            before = pools.pop()
            pool = before[0] + pool[0], before[1] + pool[1]
        pools.append(pool)
    returns = torch.cat([torch.full((count,), max(0.0, total / count), dtype=torch.float64) for total, count in pools])
    return torch.cat([torch.zeros(1, dtype=torch.float64), returns.cumsum(0)])


def config_of(path: Path) -> str | None:
    """Hash of how a gains file was measured; None if there is no readable one."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("config_hash")
    except (SafetensorError, OSError):
        return None


def sheet_identity(sheet: Cheatsheet) -> str:
    """Hash of the residuals that gains are measured for. Of the rows, which may be gigabytes, norms and scales tell."""
    scales = {f"{name}.scale": scale for name, scale in sheet.scale.items() if scale is not None}
    scales |= {f"{name}.row_scale": scale for name, scale in sheet.row_scale.items()}
    return config_hash({"bits": sheet.bits, "nested": sheet.nested, "repair": sheet.repair, "norms": sheet.norms,
                        "scales": tensors_hash(sorted(scales.items()))})


def _measured(path: Path, quant: QuantConfig, sheet: Cheatsheet | None) -> dict[str, Tensor]:
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        weights_hash = metadata.get("weights_hash")
        gains = {name: file.get_tensor(name) for name in file.keys()}
    if weights_hash != quant.weights_hash:
        raise UserError(f"{path}: measured for weights {weights_hash}, but the folder's are {quant.weights_hash}; "
                        "run measure_gains.py again")
    # Files of older versions do not tell.
    if sheet is not None and "sheet" in metadata and metadata["sheet"] != sheet_identity(sheet):
        raise UserError(f"{path}: measured for other residuals than {artifacts.CHEATSHEET} holds; run measure_gains.py again")
    if wrong := [name for name, gain in gains.items() if gain.shape != (CHUNK + 1,)]:
        raise UserError(f"{path}: {wrong[0]}: expected {CHUNK + 1} entries, got shape {tuple(gains[wrong[0]].shape)}")
    return gains


def _derived(thresholds: Thresholds) -> dict[str, Tensor]:
    """The gains of the layers whose residuals' energy is known; files of older versions know none."""
    gains = {}
    for name, rows in thresholds.row_energy.items():
        energy = thresholds.mean_square[name].double()
        # The k-th largest |x| of the worst token stands for that of the usual token, at the usual token's energy.
        by_rank = thresholds.largest[name].double().square()
        by_rank *= energy.sum() / by_rank.sum().clamp_min(1e-30)
        row_energy = (energy * rows).sum() / energy.sum().clamp_min(1e-30)
        removed = torch.cat([torch.zeros(1, dtype=torch.float64), by_rank.cumsum(0)]) * row_energy
        at = torch.tensor([sum(chunk_counts(len(energy), k)) for k in range(CHUNK + 1)])
        gains[name] = removed[at] / thresholds.output_energy[name].double().clamp_min(1e-30)
    return gains
