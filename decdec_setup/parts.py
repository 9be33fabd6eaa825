"""Finished pieces of a long piece of work, kept on disk until it is whole: what an interrupt leaves, the next run takes up."""

import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from decdec.errors import UserError
from decdec.files import atomic, config_hash


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
