"""The folder that quantize.py writes: found finished, resumed from its parts, or put together at the end."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Container, Iterator
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from decdec.artifacts import QUANT_METHOD, QuantConfig, quant_method, read_quant_config
from decdec.errors import UserError
from decdec.files import atomic, config_hash, read_json, tensors_hash, write_json
from decdec.models import local_folder, original_hash, original_of
from decdec.text import calibration_identity

from base_model import BaseModel
from model_card import card
from parts import Parts, save_tensors, stream_tensors
from quantized_blocks import PARTS
from scaling import SCALING, read_scaling, scaled_state, split_scaling

COPIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
          "generation_config.json")


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder; its files are moved into ``path`` when the block succeeds, ``config.json`` last."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
    temporary.mkdir(parents=True)
    try:
        yield temporary
        path.mkdir(exist_ok=True)
        # A reader takes a folder with a config.json for a whole model.
        (path / "config.json").unlink(missing_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
            with atomic(path / file.name) as target:  # gives it the user's own file mode, too
                os.replace(file, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_out(out: str | Path) -> None:
    """Refuse an ``out`` that is a file, or the folder of a model that was not made here, whose weights would be lost."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out: expected a folder, got the file {str(out)!r}")
    if (out / "config.json").is_file() and quant_method(out) != QUANT_METHOD:
        raise UserError(f"out: {str(out)!r} holds another model; give a folder of its own")


def model_identity(folder: Path) -> dict:
    """What tells one original model from another."""
    return {"config": read_json(folder / "config.json"), "weights": original_hash(folder)}


def dated_identity(folder: Path) -> dict:
    """What :func:`model_identity` was before it knew weights by their content: folders of that time are still finished."""
    weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.safetensors"))]
    return {"config": read_json(folder / "config.json"), "weights": weights}


def holds(out: Path, hashes: Container[str]) -> bool:
    """Whether ``out``, which :func:`check_out` let through, is a finished folder whose identity has one of ``hashes``."""
    if not (out / "config.json").is_file() or not (out / "model.safetensors").is_file():
        return False
    return (read_json(out / "config.json")["quantization_config"].get("calibration") or {}).get("config_hash") in hashes


def original_folder(folder: Path, quant: QuantConfig, model: str | None = None) -> Path:
    """The folder of the original that ``folder`` was quantized from; ``model`` if it is no longer where it was. Another is
    refused."""
    found = local_folder(model or original_of(folder, quant.base_model))
    if quant.calibration.get("original") not in (None, original_hash(found)):
        raise UserError(f"model: {folder} was not made from {found}, whose weights are others; give the model that was quantized")
    return found


class QuantizedFolder:
    """One quantization, known by the hash of ``identity``, on its way into the folder ``out``.

    Finished blocks are its ``parts`` until :meth:`finish` puts them together. ``dated``: the identity that it had before, see
    :func:`dated_identity`.
    """

    def __init__(self, out: str | Path, identity: dict, dated: dict):
        self.out = Path(out)
        check_out(out)
        self._dated = config_hash(dated)
        self.parts = Parts(self.out / ".parts", identity)

    def finished(self) -> bool:
        """Whether ``out`` already holds exactly this quantization."""
        if not holds(self.out, (self.parts.hash, self._dated)):
            return False
        self.parts.clear()  # where a kill came just before
        return True

    def finish(self, base: BaseModel, quant: QuantConfig) -> QuantConfig:
        """Write the folder from the parts of all blocks and the unquantized rest of ``base``; returns the full config.

        Packed tensors are read from the parts one at a time, so that no model has to fit into memory.
        """
        tensors: dict[str, Callable[[], Tensor]] = {}
        for block in range(len(base.blocks)):
            tensors |= self.parts.loaders(block)
        packed, scaling = split_scaling(tensors)
        scaling = {name: load() for name, load in scaling.items()}
        content = quant.to_dict() | {"weights_hash": tensors_hash((name, load()) for name, load in sorted(packed.items())),
                                     "calibration": quant.calibration | {"config_hash": self.parts.hash}}
        with atomic_folder(self.out) as folder:
            for pattern in COPIED:
                for file in base.folder.glob(pattern):
                    shutil.copyfile(file, folder / file.name)
            rest = {name: partial(_scaled, name, load, scaling) for name, load in base.outside().items()}
            stream_tensors(folder / "model.safetensors", rest | packed)
            if scaling:
                save_tensors(folder / SCALING, scaling)
            described = QuantConfig.from_dict(content)
            (folder / "README.md").write_text(card(self.out.resolve().name, described), encoding="utf-8")
            write_json(folder / "config.json", read_json(base.folder / "config.json") | {"quantization_config": content})
        if not scaling:
            (self.out / SCALING).unlink(missing_ok=True)
        self.parts.clear()
        return described


def _scaled(name: str, load: Callable[[], Tensor], scaling: dict[str, Tensor]) -> Tensor:
    tensor = load()
    return scaled_state(name, tensor, scaling).to(tensor.dtype)


class Reusable:
    """A finished folder whose blocks may serve another quantization of the same model."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.quant = read_quant_config(folder)
        if self.quant.layer_bits:
            raise UserError(f"reuse: expected a folder of one bit width, {folder} mixes several")
        self._tensors: dict[str, Tensor] | None = None

    def serves(self, wanted: QuantConfig, bits: int) -> bool:
        """Whether blocks of ``bits`` bits are just what ``wanted`` would make of them. Other settings are refused."""
        if self.quant.bits != bits:
            return False
        for name in ("method", "group_size", "calibration"):
            ours, theirs = getattr(self.quant, name), getattr(wanted, name)
            if name == "calibration":
                ours, theirs = calibration_identity(ours), calibration_identity(theirs)
                ours.pop("config_hash", None)
                if "original" not in ours:  # made before folders said it
                    theirs.pop("original", None)
            if ours != theirs:
                raise UserError(f"reuse: {self.folder}: {name.replace('_', '-')}: expected {theirs}, got {ours}")
        return True

    def block(self, name: str) -> dict[str, Tensor]:
        """Packed tensors and scale vectors of the block ``name``."""
        if self._tensors is None:
            parts = PARTS[self.quant.format]
            stored = load_file(self.folder / "model.safetensors")
            self._tensors = {key: tensor for key, tensor in stored.items() if key.rpartition(".")[2] in parts} | read_scaling(self.folder)
        found = {key: tensor for key, tensor in self._tensors.items() if key.startswith(f"{name}.")}
        if not found:
            raise UserError(f"reuse: {self.folder} has no block {name}: a folder of another model")
        return found


def summary(out: Path) -> str:
    """What a finished folder holds, as one JSON line."""
    files = {file.name: file.stat().st_size for file in sorted(out.iterdir()) if file.is_file()}
    return json.dumps({"wrote": str(out), "files": files})
