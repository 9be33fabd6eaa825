"""Times on the GPU that is here: CUDA events around graph replays that walk through more weights than the L2 holds."""

import ctypes
import functools
import hashlib
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from analytic import Rates
from profiling import Sample
from shapes import Layer
from timings import shape_of
from torch import Tensor

import decdec
from decdec import arena, ops, packing
from decdec.errors import UserError
from decdec.repair import LayerRepair

COLD_BYTES = 256 * 2**20  # distinct weights walked through in one replay: five times the 50 MB L2 of an H100
MOST_COPIES = 256  # of a layer: one below 1 MB costs a launch more than its bytes, cold or not
WARM_UP, SAMPLES = 3, 31


def library_hash() -> str:
    """Hash of the compiled kernels: times of other kernels are not reused."""
    library = sorted(Path(decdec.__file__).parent.glob("_ops*.so"))[0]
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


@functools.cache
def _green_context(sms: int):
    """A part of the GPU. It lives as long as the process: torch may hand memory allocated in one to the next."""
    from torch.cuda import green_contexts

    if not green_contexts.SUPPORTED:
        raise UserError("sms: this build of torch cannot limit SMs (green contexts need CUDA 12.8 or later)")
    torch.cuda.init()
    return green_contexts.GreenContext.create(num_sms=sms, device_id=torch.cuda.current_device())


@contextmanager
def limited_to(sms: int | None) -> Iterator[int | None]:
    """Run what is inside on ``sms`` SMs of the GPU (a green context); None for all of them. Gives the SMs that the
    driver granted: it deals them out by twos to eights, and rounds up."""
    if sms is None:
        yield None
        return
    context = _green_context(sms)
    context.set_context()
    try:
        yield _granted_sms()
    finally:
        context.pop_context()


def _granted_sms() -> int:
    """SMs of the current context, which torch does not tell."""
    driver, context, resource = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), (ctypes.c_uint32 * 128)()
    found = driver.cuCtxGetCurrent(ctypes.byref(context)) or driver.cuCtxGetDevResource(context, resource, 1)
    if found:
        raise UserError(f"sms: the driver does not tell how many SMs it granted (error {found})")
    return resource[24]  # CUdevResource.sm.smCount, 96 bytes from its start


def _stream_here() -> torch.cuda.Stream:
    """A new stream of the current context: torch's own belong to the context in which they were first asked for."""
    handle = ctypes.c_void_p()
    torch.cuda.check_error(torch.cuda.cudart().cudaStreamCreate(ctypes.addressof(handle)))
    return torch.cuda.ExternalStream(handle.value)


def _sample(run, calls: int, samples: int = SAMPLES) -> Sample:
    """Time ``run``, which makes ``calls`` equal calls: microseconds a call."""
    for _ in range(WARM_UP):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(samples)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = [1e3 * start.elapsed_time(end) / calls for start, end in events]
    low, middle, high = statistics.quantiles(times, n=4)
    return Sample(middle, (high - low) / middle, samples)


def measure_rates(sms: int) -> Rates:
    """Device copy (bytes read plus written) and pinned host-to-device copy, GB/s."""
    size = 2**28
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    dram = 2 * size / _sample(lambda: target.copy_(source), 1).us / 1e3
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    link = size / _sample(lambda: target.copy_(pinned, non_blocking=True), 1).us / 1e3
    return Rates(dram, link, sms)


def facts() -> dict:
    """What else a measurement depends on, as far as nvidia-smi tells it."""
    found = {"torch": torch.__version__, "cuda": torch.version.cuda}
    fields = ("driver_version", "pcie.link.gen.current", "pcie.link.width.current", "clocks.sm", "clocks.mem")
    if shutil.which("nvidia-smi"):
        # By its id: nvidia-smi counts all GPUs, torch those that CUDA_VISIBLE_DEVICES leaves.
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        answer = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits",
                                 f"--id=GPU-{gpu}"], capture_output=True, text=True)
        if answer.returncode == 0:
            found |= dict(zip(fields, answer.stdout.strip().split(", ")))
    return found


class _Bank:
    """Copies of one random layer, enough to outgrow the L2; residual rows in pinned host memory."""

    def __init__(self, layer: Layer, dtype: torch.dtype, selection: str):
        self.layer, self.copies = layer, min(MOST_COPIES, max(2, -(-COLD_BYTES // layer.base_bytes)))
        random = torch.Generator("cuda").manual_seed(0)
        rows = (layer.d_in, packing.residual_row_bytes(layer.d_out, layer.residual_bits))
        residuals = arena.pinned_rows([rows] * self.copies)
        self.sets = [self._random_set(dtype, random, residual) for residual in residuals]
        self.bucket = selection == "bucket"
        self.gemv, self.compensated = ((ops.codebook_gemv, ops.codebook_gemv_compensated) if layer.format == "codebook"
                                       else (ops.uniform_gemv, ops.uniform_gemv_compensated))

    def _random_set(self, dtype: torch.dtype, random: torch.Generator, residual: Tensor) -> tuple:
        layer = self.layer

        def normal(*shape: int, of: torch.dtype = torch.float16) -> Tensor:
            return torch.randn(shape, generator=random, device="cuda").to(of)

        shape = packing.packed_shape(layer.d_out, layer.d_in, layer.bits)
        qweight = torch.randint(-2**31, 2**31 - 1, shape, generator=random, device="cuda", dtype=torch.int32)
        groups = layer.d_in // (layer.group_size or layer.d_in)
        if layer.format == "codebook":
            codebook = (8000 * normal(layer.d_out, 2**layer.bits)).to(torch.int16)
            base = (qweight, codebook, normal(layer.d_out, of=torch.float32).abs())
        else:
            base = (qweight, normal(groups, layer.d_out).abs(), normal(groups, layer.d_out).abs())
        scale = None
        if layer.residual_bits != 16:
            scale = normal(groups if layer.nested else 1, layer.d_out).abs()
        # Nested residuals of codebooks come with a size per row (decdec.residual).
        sized = layer.nested and layer.format == "codebook"
        row_scale = normal(layer.d_in, of=torch.float32).abs() if sized else None
        repair = None
        if layer.repair_rank:
            repair = LayerRepair(normal(layer.repair_rank, layer.d_in, of=dtype), normal(layer.d_out, layer.repair_rank, of=dtype))
        workspace = torch.zeros(arena.workspace_bytes(layer.d_out, 1), dtype=torch.uint8, device="cuda")
        return (normal(1, layer.d_in, of=dtype), base, residual.random_(0, 256, generator=random), scale, row_scale, repair,
                workspace)

    def call(self, copy: int, n_tb: int, k_chunk: int) -> Tensor:
        layer, (x, base, residual, scale, row_scale, repair, workspace) = self.layer, self.sets[copy]
        if k_chunk == 0:
            return self.gemv(x, *base)
        b_0, b_15 = self.boundaries(k_chunk) if self.bucket else (None, None)
        out = self.compensated(x, *base, None, residual, scale, layer.residual_bits, layer.nested, k_chunk, b_0, b_15,
                               n_tb=n_tb, workspace=workspace, row_scale=row_scale)
        return out if repair is None else repair.add_to(out, x, None)

    @staticmethod
    def boundaries(k_chunk: int) -> tuple[float, float]:
        """``(b_0, b_15)`` as calibration would find them for standard normal inputs: about the largest, and a little
        above the k-th."""
        kth = torch.special.ndtri(torch.tensor(1 - min(0.999, k_chunk / 1024) / 2))
        return 5.0, float(1.1 * kth) + 0.05


class GpuTimer:
    """Times layers of random weights. Banks of all shapes stay: a refinement jumps between layers."""

    def __init__(self, dtype: str, selection: str):
        self.dtype, self.selection = getattr(torch, dtype), selection
        self.banks: dict[tuple, _Bank] = {}  # by shape, which the layers of many blocks share
        self.stream = _stream_here()

    def time(self, layer: Layer, n_tb: int, k_chunk: int) -> Sample:
        shape = shape_of(layer)
        if shape not in self.banks:
            self.banks[shape] = _Bank(layer, self.dtype, self.selection)
        bank = self.banks[shape]
        bank.call(0, n_tb, k_chunk)  # outside the capture, for what the first call of a kernel sets up
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for copy in range(bank.copies):
                bank.call(copy, n_tb, k_chunk)
        return _sample(graph.replay, bank.copies)
