"""Times of the CUDA ops on this GPU, beside what its memory and its host link allow in the same run.

    python kernels.py --models llama-3-8b --bits 3 4 --k-chunk 8 32 --json results/h100.jsonl

Every time is the median over replays of one CUDA graph that walks through more distinct weights (256 MB) than the L2
cache holds, divided by its calls. The limit of a base GEMV is the time its codes and tables take at the copy rate;
that of a compensated one the larger of that and the time its residual rows take at the gather rate of the link.
"""

import argparse
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from decdec import arena, files, ops, packing, reference
from decdec.errors import UserError, run

COLD_BYTES = 256 * 2**20
WARM_UP, SAMPLES = 3, 31
GRAPH_CALLS = 48  # at least, so that the start of a replay does not count
GROUP_SIZE = 128
RESIDUAL_BITS = 4

# d_in, d_out of the fused layers of a block
MODELS = {
    "llama-3-8b": {"qkv": (4096, 6144), "o": (4096, 4096), "gu": (4096, 28672), "d": (14336, 4096)},
    "llama-3-70b": {"qkv": (8192, 10240), "o": (8192, 8192), "gu": (8192, 57344), "d": (28672, 8192)},
    "phi-3-medium": {"qkv": (5120, 7680), "o": (5120, 5120), "gu": (5120, 35840), "d": (17920, 5120)},
    "qwen2.5-7b": {"qkv": (3584, 4608), "o": (3584, 3584), "gu": (3584, 37888), "d": (18944, 3584)},
}


@dataclass(frozen=True)
class Row:
    """One result. ``gbps``: code and table bytes a second for a base GEMV, residual bytes a second for what uses the
    link."""

    bench: str
    format: str | None
    bits: int | None
    d_in: int | None
    d_out: int | None
    k_chunk: int
    n_tb: int
    sms: int
    us: float
    spread: float
    gbps: float
    pct_of_limit: float | None
    batch: int
    device: str


def time_us(calls) -> tuple[float, float]:
    """Median microseconds of one of ``calls`` (functions without arguments) in a graph of all, and the quartiles'
    distance."""
    calls = calls * -(-GRAPH_CALLS // len(calls))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times = []
        for _ in range(WARM_UP + SAMPLES):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1e3 * start.elapsed_time(end) / len(calls))
    low, middle, high = statistics.quantiles(times[WARM_UP:], n=4)
    return middle, high - low


class Bench:
    def __init__(self, arguments):
        self.arguments, self.rows = arguments, []
        self.device = torch.cuda.get_device_name()
        self.sms = arguments.sms or torch.cuda.get_device_properties(0).multi_processor_count
        self.generator = torch.Generator("cuda").manual_seed(0)
        self.workspace = torch.zeros(arena.workspace_bytes(65536, arguments.batch), dtype=torch.uint8, device="cuda")

    def add(self, bench, time, size, limit_us=None, *, layer=(None, None), form=None, bits=None, k_chunk=0, n_tb=0):
        us, spread = time
        row = Row(
            bench,
            form,
            bits,
            *layer,
            k_chunk,
            n_tb,
            self.sms,
            round(us, 3),
            round(spread, 3),
            round(size / us / 1e3, 1),
            None if limit_us is None else round(100 * limit_us / us, 1),
            self.arguments.batch,
            self.device,
        )
        self.rows.append(row)
        if self.arguments.json:
            files.append_row(self.arguments.json, asdict(row))

    def measure_limits(self):
        """Rates of a device copy (read plus written) and of the link's gather, GB/s."""
        size = 2**28
        source, target = (
            torch.empty(size, dtype=torch.uint8, device="cuda").random_(generator=self.generator) for _ in range(2)
        )
        time = time_us([lambda: target.copy_(source)] * 4)
        self.dram = 2 * size / time[0] / 1e3
        self.add("device copy", time, 2 * size)
        self.link = 0.0
        for d_out, selected in ((4096, 16), (4096, 32), (4096, 128), (28672, 128), (28672, 1024)):  # 32 KB to 15 MB
            row_bytes = packing.residual_row_bytes(d_out, RESIDUAL_BITS)
            residual = arena.pinned_rows([(8192, row_bytes)])[0]
            x, scale = torch.randn(1, 8192, device="cuda").half(), torch.ones(1, d_out, device="cuda").half()
            chosen = [
                torch.randperm(8192, device="cuda", generator=self.generator)[:selected].sort().values.int()[None]
                for _ in range(8)
            ]
            time = time_us(
                [lambda i=i: ops.residual_gemv(x, i, residual, scale, RESIDUAL_BITS, False, d_out) for i in chosen]
            )
            self.add(
                "link gather",
                time,
                selected * row_bytes,
                layer=(8192, d_out),
                k_chunk=selected // 8,
                bits=RESIDUAL_BITS,
            )
            self.link = max(self.link, selected * row_bytes / time[0] / 1e3)

    def weights(self, form: str, bits: int, d_in: int, d_out: int) -> tuple[list[tuple], int]:
        """Random layers, enough to outgrow the L2, and the bytes of one."""
        shape = packing.packed_shape(d_out, d_in, bits)
        size = 4 * torch.Size(shape).numel()
        groups = d_in // GROUP_SIZE
        size += d_out * (2 * 2**bits + 4) if form == "codebook" else 4 * groups * d_out

        def normal(*shape):
            return torch.randn(shape, generator=self.generator, device="cuda")

        layers = []
        for _ in range(max(2, -(-COLD_BYTES // size))):
            codes = torch.randint(-(2**31), 2**31, shape, generator=self.generator, device="cuda", dtype=torch.int32)
            if form == "codebook":
                layers.append(
                    (codes, (8000 * normal(d_out, 2**bits)).clamp(-32767, 32767).short(), 1e-5 * normal(d_out).abs())
                )
            else:
                layers.append(
                    (
                        codes,
                        (0.01 * normal(groups, d_out).abs()).half(),
                        torch.full((groups, d_out), 2.0 ** (bits - 1), device="cuda").half(),
                    )
                )
        return layers, size

    def run_layer(self, form: str, bits: int, layer: tuple[int, int]):
        d_in, d_out = layer
        base, compensated = (
            (ops.codebook_gemv, ops.codebook_gemv_compensated)
            if form == "codebook"
            else (ops.uniform_gemv, ops.uniform_gemv_compensated)
        )
        layers, size = self.weights(form, bits, d_in, d_out)
        x = torch.randn(self.arguments.batch, d_in, generator=self.generator, device="cuda").half()
        floor = size / self.dram / 1e3
        scale = torch.ones(1, d_out, device="cuda").half()
        time = time_us([lambda w=w: base(x, *w) for w in layers])
        self.add("base", time, size, floor, layer=layer, form=form, bits=bits)
        for name, bits_of_residual, nested, selection in self.compensations():
            row_bytes = packing.residual_row_bytes(d_out, bits_of_residual)
            # Nested residuals of codebooks have a size for each row (decdec.residual).
            row_scale = torch.rand(d_in, device="cuda") if nested and form == "codebook" else None
            residuals = arena.pinned_rows([(d_in, row_bytes)] * len(layers)) if self.arguments.k_chunk else []
            for k_chunk in (k * RESIDUAL_BITS // bits_of_residual for k in self.arguments.k_chunk):
                moved = self.arguments.batch * sum(reference.chunk_counts(d_in, k_chunk)) * row_bytes
                limits = self.boundaries(x, k_chunk) if selection == "buckets" else (None, None)
                for n_tb in self.arguments.n_tb:
                    time = time_us(
                        [
                            lambda w=w, r=r: compensated(
                                x,
                                *w,
                                None,
                                r,
                                w[1] if nested and form == "uniform" else scale,
                                bits_of_residual,
                                nested,
                                k_chunk,
                                *limits,
                                n_tb=n_tb,
                                workspace=self.workspace,
                                row_scale=row_scale,
                            )
                            for w, r in zip(layers, residuals)
                        ]
                    )
                    limit = max(floor, moved / self.link / 1e3)
                    self.add(name, time, moved, limit, layer=layer, form=form, bits=bits, k_chunk=k_chunk, n_tb=n_tb)

    def compensations(self):
        """Name, residual bits, whether nested, and selection of every kind of compensation asked for."""
        yield "compensated", RESIDUAL_BITS, False, "exact"
        if self.arguments.buckets:
            yield "compensated by buckets", RESIDUAL_BITS, False, "buckets"
        for bits in self.arguments.nested:
            yield f"compensated, nested r{bits}", bits, True, "exact"

    @staticmethod
    def boundaries(x: torch.Tensor, k_chunk: int) -> tuple[float, float]:
        """The buckets' b_0 and b_15 as a calibration with these activations would give them."""
        ranked = x.float().abs().sort(descending=True).values
        return float(ranked[0, 0]), float(ranked[0, max(k_chunk * x.shape[1] // 1024, 1) - 1])

    def table(self) -> str:
        lines = [
            f"{self.device}, {self.sms} SMs",
            f"{'':36}{'d_in':>6}{'d_out':>7}{'k_chunk':>8}{'n_tb':>5}{'us':>9}{'GB/s':>8}{'limit':>7}",
        ]
        for row in self.rows:
            name = " ".join(str(part) for part in (row.bench, row.format, row.bits and f"w{row.bits}") if part)
            share = "" if row.pct_of_limit is None else f"{row.pct_of_limit:.0f} %"
            lines.append(
                f"{name:36}{row.d_in or '':>6}{row.d_out or '':>7}{row.k_chunk or '':>8}{row.n_tb or '':>5}"
                f"{row.us:9.2f}{row.gbps:8.0f}{share:>7}"
            )
        return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["llama-3-8b"], help="whose layer shapes to time"
    )
    parser.add_argument("--layers", nargs="+", choices=("qkv", "o", "gu", "d"), default=["qkv", "o", "gu", "d"])
    parser.add_argument("--formats", nargs="+", choices=("codebook", "uniform"), default=["codebook", "uniform"])
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4), default=[3, 4])
    parser.add_argument("--k-chunk", nargs="*", type=int, default=[], help="channels a chunk; none: base GEMVs only")
    parser.add_argument("--n-tb", nargs="+", type=int, default=[8, 16], help="thread blocks given to compensation")
    parser.add_argument("--buckets", action="store_true", help="time the paper's selection by buckets as well")
    parser.add_argument(
        "--nested",
        nargs="*",
        type=int,
        choices=(1, 2, 3, 4),
        default=[],
        help="bits of nested residuals to time as well; k_chunk grows so that as many bytes are read",
    )
    parser.add_argument("--batch", type=int, default=1, help="rows of x")
    parser.add_argument("--sms", type=int, help="run inside a green context of this many SMs")
    parser.add_argument("--json", type=Path, help="append one JSON line a result to this file")
    arguments = parser.parse_args()
    for name, values in (("n-tb", arguments.n_tb), ("batch", [arguments.batch]), ("sms", [arguments.sms or 1])):
        if min(values) < 1:
            raise UserError(f"--{name}: expected positive numbers, got {min(values)}")
    widest = reference.CHUNK * min([RESIDUAL_BITS, *arguments.nested]) // RESIDUAL_BITS
    for k_chunk in arguments.k_chunk:
        if not 1 <= k_chunk <= widest:
            raise UserError(f"--k-chunk: expected 1 to {widest} with these residuals, got {k_chunk}")
    return arguments


def main():
    arguments = parse()
    if not torch.cuda.is_available():
        raise UserError("these benchmarks need a CUDA GPU: torch sees none")
    if arguments.sms:
        from torch.cuda import green_contexts

        torch.cuda.init()
        context = green_contexts.GreenContext.create(num_sms=arguments.sms, device_id=0)
        context.set_context()
    bench = Bench(arguments)
    bench.measure_limits()
    work = [
        (form, bits, MODELS[model][layer])
        for model in arguments.models
        for form in arguments.formats
        for bits in arguments.bits
        for layer in arguments.layers
    ]
    for form, bits, layer in tqdm(work, file=sys.stderr):
        bench.run_layer(form, bits, layer)
    print(bench.table())
    if arguments.sms:
        context.pop_context()


if __name__ == "__main__":
    run(main)
