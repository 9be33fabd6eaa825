"""Writing files so that nothing half-written is ever left, hashing them, and JSON-lines results."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from decdec.errors import UserError

ABANDONED = 3600  # seconds; nothing is written with longer pauses


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; renamed to ``path`` when the block succeeds, removed when it does not.

    What killed processes left of the same file goes too, once it is ``ABANDONED``: by age, since network file systems may
    not tell of each other's processes and locks.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.unfinished-"
    for left in path.parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; give them what the user's umask would.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_torch(path: str | Path, content: object) -> None:
    """``torch.save`` that leaves the old file, or none, when it fails; a full disk is an OSError as everywhere else.

    The same content gives the same bytes: a path would put its own, temporary name into the file.
    """
    with atomic(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's own writer loses the errno
            if shutil.disk_usage(temporary.parent).free < 1 << 20 or "No space" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
            raise


def write_json(path: str | Path, content: object) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected JSON, got {error}") from None


def safetensors_names(folder: Path) -> list[str]:
    """The safetensors files of a Hugging Face folder: those of its index, or else ``model.safetensors`` if it is there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted(set(read_json(index)["weight_map"].values()))
    return ["model.safetensors"] if (folder / "model.safetensors").is_file() else []


class Span(NamedTuple):
    """Where a tensor lies: ``size`` bytes from ``start`` of a safetensors file; ``dtype`` by its name there."""

    path: Path
    start: int
    size: int
    dtype: str
    shape: list[int]


def safetensors_spans(folder: Path, names: Iterable[str]) -> dict[str, Span]:
    """Where the tensors of the safetensors files ``names`` lie, from the files' headers alone."""
    spans = {}
    for name in names:
        path = folder / name
        with open_safetensors(path), open(path, "rb") as file:  # the first says whether the header can be trusted
            length = int.from_bytes(file.read(8), "little")
            for key, tensor in json.loads(file.read(length)).items():
                if key != "__metadata__":
                    first, end = tensor["data_offsets"]
                    spans[key] = Span(path, 8 + length + first, end - first, tensor["dtype"], tensor["shape"])
    return spans


def open_safetensors(path: Path) -> safe_open:
    """An open safetensors file, whose tensors are read one by one; a UserError if it cannot be read."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: expected a safetensors file, got one that cannot be read ({error})") from None


def append_row(path: str | Path, *rows: dict) -> None:
    """Append results as JSON lines, in a single write so that an interrupt cannot cut or part them; all or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with open(path, "ab", buffering=0) as file:
        written = file.write(lines)
        if written < len(lines):  # the disk is full
            file.truncate(file.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a JSON-lines file; none if it does not exist."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                raise UserError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}") from None
    return rows


def config_hash(config: dict) -> str:
    """Short hash of a configuration: what is finished is reused only if this agrees."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def tensors_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Short hash over names and bytes of tensors, in the given order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        # Through a byte view, since numpy knows no bfloat16.
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()[:16]
