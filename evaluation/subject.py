"""What a measurement is about, an original model or a DecDEC folder, and the part of every row that says so."""

import argparse
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import decdec
from decdec import artifacts, hub, models, text
from decdec.errors import UserError, check_device
from decdec.files import append_row, config_hash, read_rows
from decdec.compensated import SELECTIONS, Compensation

# What tells two subjects and their compensation apart, in the key of every measurement.
SUBJECT_KEY = ("model", "weights_hash", "method", "bits", "selection", "k_chunk", "residual_bits", "nested", "repair", "dtype",
               "seed", "thresholds")
CALIBRATED = ("bucket", "static")  # the selections that take thresholds.pt


@dataclass(frozen=True)
class Setting:
    """One way to compensate; ``selection`` is ``"none"`` where nothing is. ``repair``: with the folder's static repair."""

    selection: str = "none"
    k_chunk: int = 0
    repair: bool = False

    def compensation(self, seed: int, prefill: bool) -> Compensation:
        return Compensation(k_chunk=self.k_chunk, selection=self.selection if self.k_chunk else "bucket", prefill=prefill, seed=seed,
                            repair=self.repair)


@dataclass(frozen=True)
class Subject:
    """A model folder or hub id and how it is run. ``quant`` is None for an original model."""

    source: str
    quant: artifacts.QuantConfig | None
    cheatsheet: Path | None
    dtype: str
    device: str
    seed: int
    repair: bool = False

    def load(self) -> nn.Module:
        """The model, compensating nothing yet."""
        dtype = getattr(torch, self.dtype)
        if self.quant is None:
            return models.load_model(self.source, dtype).to(self.device)
        return hub.load(self.source, dtype=dtype, cheatsheet=self.cheatsheet, device=self.device)

    def describe(self, bench: str) -> dict:
        """The part of a row that all settings of a run share."""
        row = {"bench": bench}
        if self.quant is None:
            row |= {"model": _name(self.source), "method": "original", "bits": 16, "group_size": None,
                    "weights_hash": models.original_hash(models.local_folder(self.source))}
        else:
            bits = sorted({self.quant.bits, *self.quant.layer_bits.values()})
            row |= {"model": _name(models.original_of(self.source, self.quant.base_model)), "method": self.quant.method,
                    "bits": bits[0] if len(bits) == 1 else bits, "group_size": self.quant.group_size,
                    "weights_hash": self.quant.weights_hash}
        cuda = self.device.startswith("cuda")
        repair = artifacts.load_repair(Path(self.source) / artifacts.REPAIR, self.quant) if self.repair else None
        settings = {key: repair.calibration[key] for key in ("rank", "center", "k_chunk")} if repair else None
        return row | {"repair": repair and repair.hash, "repair_settings": settings, "dtype": self.dtype, "seed": self.seed,
                      "device": torch.cuda.get_device_name(self.device) if cuda else f"cpu {platform.machine()}",
                      "torch": torch.__version__, "decdec": decdec.__version__}

    def settings(self, selections: list[str], k_chunks: list[int]) -> list[Setting]:
        """What to measure; ``k_chunk`` 0 is the same for every selection and measured once."""
        if self.quant is None:
            if any(k_chunks) or self.repair:
                raise UserError(f"--{'repair' if self.repair else 'k-chunk'}: {self.source} is not a DecDEC folder, only k_chunk 0 "
                                "can be measured")
            return [Setting()]
        base = [Setting(repair=self.repair)] if 0 in k_chunks else []
        return base + [Setting(selection, k, self.repair) for selection in selections for k in k_chunks if k]

    def residual(self) -> dict:
        """Bits and form of the residuals, from the cheatsheet."""
        folder = Path(self.source)
        source = hub.Source(folder, self.quant, self.cheatsheet or folder / artifacts.CHEATSHEET)
        sheet = artifacts.load_cheatsheet(source.residuals(self.repair), self.quant)
        return {"residual_bits": sheet.bits, "nested": sheet.nested}

    def compensated_rows(self, bench: str, settings: list[Setting]) -> list[dict]:
        """For every setting the part of its row that says what was compensated with what."""
        residual = self.residual() if any(setting.k_chunk for setting in settings) else {}
        none = {"residual_bits": None, "nested": None}
        calibrated = any(setting.selection in CALIBRATED for setting in settings)
        thresholds = self.thresholds_hash() if calibrated else None
        return [self.describe(bench) | {"selection": setting.selection, "k_chunk": setting.k_chunk,
                                        "thresholds": thresholds if setting.selection in CALIBRATED else None,
                                        **(residual if setting.k_chunk else none)} for setting in settings]

    def thresholds_hash(self) -> str:
        """What the folder's thresholds were calibrated on."""
        thresholds = artifacts.load_thresholds(Path(self.source) / artifacts.THRESHOLDS, self.quant)
        return config_hash(text.calibration_identity(thresholds.calibration))


def _name(source: str) -> str:
    """The last part of a folder's path or a hub id. Links are not followed: the hub's cache holds snapshots by their commits."""
    return Path(os.path.abspath(source)).name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="DecDEC folder, or an original model's folder or hub id")
    parser.add_argument("--cheatsheet", help="another residual file than the folder's cheatsheet.pt")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default float32, on a GPU float16")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of whatever is drawn at random (default 0)")


def add_settings(parser: argparse.ArgumentParser, k_chunk: int = 0) -> None:
    parser.add_argument("--k-chunk", type=int, nargs="+", default=[k_chunk], metavar="K",
                        help=f"channels a chunk, 0..1024 (default {k_chunk})")
    parser.add_argument("--selection", nargs="+", default=["bucket"], choices=SELECTIONS,
                        help="how channels are chosen (default bucket, the paper's)")
    parser.add_argument("--repair", action="store_true",
                        help=f"with the folder's static repair, and the residuals of what it leaves ({artifacts.REPAIRED_CHEATSHEET})")


def from_arguments(arguments: argparse.Namespace) -> Subject:
    """The subject that ``add_arguments`` asked for; a UserError if it is no model, or if a ``k_chunk`` is out of range."""
    for k_chunk in getattr(arguments, "k_chunk", ()):
        if not 0 <= k_chunk <= 1024:
            raise UserError(f"--k-chunk: expected 0..1024, got {k_chunk}")
    check_device(arguments.device)
    dtype = arguments.dtype or ("float16" if arguments.device.startswith("cuda") else "float32")
    models.check_source(arguments.model)
    folder = Path(arguments.model)
    quantized = folder.is_dir() and artifacts.quant_method(folder)
    return Subject(arguments.model, artifacts.read_quant_config(folder) if quantized else None,
                   Path(arguments.cheatsheet) if arguments.cheatsheet else None, dtype, arguments.device, arguments.seed,
                   getattr(arguments, "repair", False))


def sequence_length(arguments: argparse.Namespace) -> int:
    """``--length``, by default the model's longest sequence up to the paper's 2048 tokens."""
    return min(2048, models.context_length(arguments.model)) if arguments.length is None else arguments.length


def folder_from_arguments(arguments: argparse.Namespace) -> Subject:
    """The same, for measurements that only a DecDEC folder allows."""
    subject = from_arguments(arguments)
    if subject.quant is None:
        raise UserError(f"--model: expected a DecDEC folder, {arguments.model} is an original model")
    return subject


def before(row: dict) -> dict:
    """The row as earlier versions wrote it: without thresholds, and of an original model without the hash of its weights."""
    return row | {"thresholds": None} | ({"weights_hash": None} if row.get("method") == "original" else {})


class Rows:
    """The rows of a JSON-lines file by what makes two the same measurement: none is written twice, nor those of earlier versions."""

    def __init__(self, path: str | Path, key: tuple[str, ...]):
        self.path, self.key = path, key
        self.known = {self._of(row): row for row in read_rows(path)}

    def _of(self, row: dict) -> tuple[str, ...]:
        return tuple(str(row.get(name)) for name in self.key)

    def find(self, row: dict) -> dict | None:
        return self.known.get(self._of(row)) or self.known.get(self._of(before(row)))

    def append(self, *rows: dict) -> None:
        """Write rows that belong together: all of them or, if interrupted, none."""
        append_row(self.path, *rows)
        self.known |= {self._of(row): row for row in rows}
