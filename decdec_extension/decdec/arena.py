"""Where the residuals of a model on a GPU live: one exactly sized piece of pinned host memory for all layers.

``torch.Tensor.pin_memory`` rounds every tensor up to a power of two and registers each of them; an arena is as large
as the residuals and registered once. Kernels read it over the link through CUDA-typed tensors, which own it: when the
last is gone, so is the memory. Residuals may lie in GPU memory as well, through the same kernels. Import this only
where there is a GPU.
"""

import itertools
import math
import resource
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from decdec import _library
from decdec.errors import UserError

_library.load()

ALIGN = 4096  # a tensor begins at a page of its own, so that no two layers share one


def workspace_bytes(d_out: int, batch: int = 8) -> int:
    """Bytes of the zeroed uint8 tensor that a compensated GEMV of ``batch`` rows takes as ``workspace``.

    Every output has eight: where the base GEMV and the compensation meet. A larger workspace serves smaller layers too.
    """
    return 8 * d_out * batch


def available_bytes() -> int | None:
    """Host memory that can be had without swapping, as Linux estimates it; None where it does not tell."""
    try:
        with open("/proc/meminfo") as lines:
            found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        return None
    return 1024 * int(found[0]) if found else None


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.2f} GB"


def _locked_limit() -> str:
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "unlimited" if soft == resource.RLIM_INFINITY else _gigabytes(soft)


def _allocate(
    sizes: Sequence[int], device: int, huge_pages: bool, check_memory: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """CPU and CUDA views, uint8 of each size, of one new arena."""
    padded = [-(-size // ALIGN) * ALIGN for size in sizes]
    total, free = sum(padded), available_bytes()
    if check_memory and free is not None and total > free:
        raise UserError(
            f"residuals: expected at most {_gigabytes(free)}, the host memory available, got {_gigabytes(total)}"
        )
    try:
        host, seen = torch.ops.decdec.pinned_arena(max(total, 1), device, huge_pages)
    except RuntimeError as error:
        raise UserError(
            f"residuals: {_gigabytes(total)} of host memory could not be pinned ({_gigabytes(free)} available, "
            f"limit of locked memory {_locked_limit()}): {error}"
        ) from error
    starts = [0, *itertools.accumulate(padded)]
    return (
        [host[start : start + size] for start, size in zip(starts, sizes)],
        [seen[start : start + size] for start, size in zip(starts, sizes)],
    )


def _index(device: torch.device | str | int | None) -> int:
    if device is None:
        return torch.cuda.current_device()
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index


def pinned_rows(
    shapes: Iterable[Sequence[int]],
    device: torch.device | str | int | None = None,
    *,
    huge_pages: bool = True,
    check_memory: bool = True,
) -> list[Tensor]:
    """CUDA-typed uint8 tensors of these shapes in one new arena, all zero.

    ``device``: the GPU that they name, whose ops take them. ``check_memory=False`` tries even what seems too
    much, for machines whose memory grows as it is used. Raises UserError, with sizes, if the host cannot give or pin
    the memory.
    """
    shapes = [tuple(shape) for shape in shapes]
    _, seen = _allocate([math.prod(shape) for shape in shapes], _index(device), huge_pages, check_memory)
    return [tensor.view(shape) for tensor, shape in zip(seen, shapes)]


def pin(
    residuals: Iterable[Tensor],
    device: torch.device | str | int | None = None,
    *,
    huge_pages: bool = True,
    check_memory: bool = True,
) -> list[Tensor]:
    """Copies of CPU uint8 tensors in one new arena, as CUDA-typed tensors; see :func:`pinned_rows`."""
    residuals = list(residuals)
    for residual in residuals:
        if residual.device.type != "cpu" or residual.dtype != torch.uint8:
            raise UserError(f"residuals: expected uint8 tensors on cpu, got {residual.dtype} on {residual.device}")
    host, seen = _allocate([residual.numel() for residual in residuals], _index(device), huge_pages, check_memory)
    for target, residual in zip(host, residuals):
        target.view(residual.shape).copy_(residual)
    return [tensor.view(residual.shape) for tensor, residual in zip(seen, residuals)]
