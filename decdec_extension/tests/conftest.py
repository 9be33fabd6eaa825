"""Random packed weights and residuals, each with the float64 matrix it stands for, computed here and not by decdec."""

import ctypes
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from decdec import decode_ops, ops, packing


@dataclass(frozen=True)
class Base:
    """Packed base weights: ``args`` as the ops take them, ``dense`` ``(d_out, d_in)`` float64."""

    form: str
    args: tuple[Tensor, Tensor, Tensor]
    dense: Tensor


@dataclass(frozen=True)
class Residual:
    """A packed residual: ``args`` are residual, scale, bits and nested; ``dense`` is ``(d_in, d_out)`` float64."""

    args: tuple[Tensor, Tensor | None, int, bool]
    dense: Tensor


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def emulated_library() -> ctypes.CDLL:
    """The CUDA ops built for the CPU (emulated/build.py), loaded as ``torch.ops.decdec_emulated``."""
    spec = importlib.util.spec_from_file_location("emulated_build", Path(__file__).parent / "emulated" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    library = module.build()
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


@pytest.fixture
def emulation(emulated_library, monkeypatch):
    """The CUDA ops stand in for the CPU's, on a small device of the H100's kind; ``emulation(...)`` makes it another."""

    def device(sms: int = 3, shared_per_sm: int = 228 << 10, shared_per_block: int = 227 << 10, major: int = 9):
        emulated_library.emulated_device(sms, shared_per_sm, shared_per_block, major, 0)

    for module in (ops, decode_ops):
        monkeypatch.setattr(module, "_ops", torch.ops.decdec_emulated)
    device()
    return device


@pytest.fixture
def make_base():
    """``make_base(form, d_in, d_out, bits, group_size=None)``: form is codebook or uniform; no size is one group."""

    def make(form: str, d_in: int, d_out: int, bits: int, group_size: int | None = None) -> Base:
        codes = torch.randint(0, 2**bits, (d_out, d_in))
        qweight = packing.pack_codes(codes, bits)
        if form == "codebook":
            codebook = torch.randint(-32767, 32768, (d_out, 2**bits), dtype=torch.int16)
            scale = torch.rand(d_out) * 1e-4
            dense = codebook.double().gather(1, codes) * scale.double()[:, None]
            return Base(form, (qweight, codebook, scale), dense)
        size = group_size or d_in
        scales = (torch.rand(d_in // size, d_out) + 0.1).half()
        zeros = (torch.rand(d_in // size, d_out) * 2**bits).half()
        of_input = torch.arange(d_in) // size
        dense = (codes - zeros.double()[of_input].t()) * scales.double()[of_input].t()
        return Base(form, (qweight, scales, zeros), dense)

    return make


@pytest.fixture
def make_residual():
    """``make_residual(d_in, d_out, bits, groups=1, nested=False)``."""

    def make(d_in: int, d_out: int, bits: int, groups: int = 1, nested: bool = False) -> Residual:
        if bits == 16:
            values = torch.randn(d_in, d_out).half()
            return Residual((packing.pack_residual(values, 16), None, 16, nested), values.double())
        half = 2 ** (bits - 1)
        codes = torch.randint(-half, half, (d_in, d_out))
        scale = (torch.rand(groups, d_out) + 0.1).half()
        step = scale.double()[torch.arange(d_in) // (d_in // groups)]
        dense = (codes + 0.5) * step / 2**bits if nested else codes * step
        return Residual((packing.pack_residual(codes, bits), scale, bits, nested), dense)

    return make
