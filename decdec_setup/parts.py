"""Finished pieces of a long piece of work, kept on disk until it is whole: what an interrupt leaves, the next run takes up."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from decdec.errors import UserError
from decdec.files import atomic, config_hash

_STORED = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
           torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


class Parts:
    """The pieces of the work that ``identity`` describes, as ``folder/HASH-NUMBER.safetensors``.

    The hash is that of ``identity``, so pieces made with other settings are never taken for these. Name everything in it that
    the pieces depend on.
    """

    def __init__(self, folder: str | Path, identity: dict):
        self.folder, self.hash = Path(folder), config_hash(identity)

    @classmethod
    def beside(cls, out: Path, identity: dict) -> "Parts":
        """The pieces of the file ``out``, in a hidden folder next to it."""
        return cls(out.with_name(f".{out.name}.parts"), identity)

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.hash}-{number:04d}.safetensors"

    def has(self, number: int) -> bool:
        return self._path(number).is_file()

    def save(self, number: int, tensors: dict[str, Tensor]) -> None:
        save_tensors(self._path(number), tensors)

    def load(self, number: int) -> dict[str, Tensor]:
        return load_file(self._path(number))

    def loaders(self, number: int) -> dict[str, Callable[[], Tensor]]:
        """What loads each tensor of a piece."""
        with safe_open(self._path(number), framework="pt") as file:
            return {name: partial(self._tensor, number, name) for name in file.keys()}

    def _tensor(self, number: int, name: str) -> Tensor:
        with safe_open(self._path(number), framework="pt") as file:  # a file that stays open keeps every page that was read
            return file.get_tensor(name)

    def clear(self) -> None:
        """Remove all pieces, those of other settings too."""
        shutil.rmtree(self.folder, ignore_errors=True)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that is whole or not there."""
    with atomic(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"{path}: could not be written: {error}") from None


def stream_tensors(path: Path, loaders: dict[str, Callable[[], Tensor]]) -> None:
    """As :func:`save_tensors`, with one tensor in memory at a time: each is loaded once for its shape and once to be written."""
    shapes = {name: (tensor.dtype, list(tensor.shape), tensor.nbytes) for name, load in loaders.items() for tensor in (load(),)}
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    names = sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))  # so that each lies at a multiple of its item's size
    end = 0
    for name in names:
        dtype, shape, size = shapes[name]
        header[name] = {"dtype": _STORED[dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(memoryview(loaders[name]().contiguous().flatten().view(torch.uint8).numpy()))
