"""Times of the small CUDA ops of a decoding step, of dequantization for prefill and of the static repair, at Llama-3-8B's sizes.

    python decode_ops.py --json results/h100_decode_ops.jsonl

Timed as in kernels.py: the median over replays of one CUDA graph, of which each call may start while the one ahead of
it ends. Caches and weights are cold; what a kernel ahead would just have written (activations, logits) lies in the L2.
"""

import argparse
from dataclasses import asdict, dataclass

import torch

from decdec import decode_ops, files, ops, packing
from decdec.errors import UserError, run
from decdec.repair import LayerRepair
from kernels import COLD_BYTES, MODELS, time_us

HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4096, 14336, 32, 8, 128, 128256
PLACES = 8192
REPAIR_RANK = 8
LIVE = (16, 200, 256, 257, 1000, 4000, 8000)  # lengths at which attention is timed


@dataclass(frozen=True)
class Row:
    """``size``: live places, width or weights (of a repair, its layer's); ``gbps``: what is read from memory, and written by
    dequantization."""

    bench: str
    size: int
    us: float
    spread: float
    gbps: float
    device: str


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").half()


def attention(live: int) -> tuple[list, int]:
    read = 2 * KV_HEADS * live * HEAD_DIM * 2
    caches = [tuple(half(KV_HEADS, PLACES, HEAD_DIM) for _ in range(2)) for _ in range(8)]
    qkv, position = half(1, (HEADS + 2 * KV_HEADS) * HEAD_DIM), torch.tensor([live - 1], device="cuda")
    frequencies = torch.rand(1, HEAD_DIM // 2, device="cuda")
    workspace = torch.zeros(4 * HEADS, dtype=torch.uint8, device="cuda")
    bound = 256 if live <= 256 else 0
    return [lambda c=c: decode_ops.attend(qkv, position, *c, frequencies, 1.0, 0, HEAD_DIM**-0.5, 0, None, None, 1e-6,
                                          bound, workspace) for c in caches], read


def head(dtype: torch.dtype) -> tuple[list, int]:
    x = half(1, HIDDEN)
    if dtype == torch.float16:
        weight, scale = half(VOCABULARY, HIDDEN), None
    else:
        weight = torch.randint(-127, 128, (VOCABULARY, HIDDEN), dtype=dtype, device="cuda")
        scale = torch.rand(VOCABULARY, device="cuda")
    return [lambda: decode_ops.head_gemv(x, weight, scale)], weight.nbytes


def dequantization(form: str, bits: int, d_in: int, d_out: int) -> tuple[list, int]:
    shape = packing.packed_shape(d_out, d_in, bits)
    copies = max(2, COLD_BYTES // (4 * torch.Size(shape).numel()))
    words = [torch.randint(-(2**31), 2**31, shape, device="cuda", dtype=torch.int32) for _ in range(copies)]
    if form == "codebook":
        entries = torch.randint(-(2**15), 2**15, (d_out, 2**bits), device="cuda")
        tables = entries.short(), torch.rand(d_out, device="cuda")
    else:
        tables = half(d_in // 128, d_out), half(d_in // 128, d_out)
    op = getattr(ops, f"{form}_dequantize")
    return [lambda w=w: op(w, *tables, d_in, torch.float16) for w in words], words[0].nbytes + 2 * d_in * d_out


def static_repair(centred: bool, d_in: int, d_out: int) -> tuple[list, int]:
    x, out = half(1, d_in), half(1, d_out)
    mean = (torch.randn(d_in, device="cuda"), half(d_out)) if centred else (None, None)
    repairs = [LayerRepair(half(REPAIR_RANK, d_in), half(d_out, REPAIR_RANK), *mean) for _ in range(64)]
    return [lambda r=r: r.add_to(out, x, r.near(x)) for r in repairs], sum(part.nbytes for part in repairs[0].tensors())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="ROWS.jsonl", help="append the rows")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("no GPU: these are times of the CUDA ops")
    logits, workspace = torch.randn(1, VOCABULARY, device="cuda"), torch.zeros(16, dtype=torch.uint8, device="cuda")
    x, norm, gate_up = half(1, HIDDEN), half(HIDDEN), half(1, 2 * MLP)
    cases = [("attend", live, attention, (live,)) for live in LIVE]
    cases += [("rms_norm", HIDDEN, lambda: ([lambda: decode_ops.rms_norm(x, norm, 1e-5)], x.nbytes + norm.nbytes), ()),
              ("silu_mul", MLP, lambda: ([lambda: decode_ops.silu_mul(gate_up)], gate_up.nbytes), ()),
              ("argmax", VOCABULARY, lambda: ([lambda: decode_ops.argmax(logits, workspace)], logits.nbytes), ()),
              ("head fp16", VOCABULARY, head, (torch.float16,)), ("head int8", VOCABULARY, head, (torch.int8,))]
    cases += [(f"dequantize {form} {bits} bits", layer[0] * layer[1], dequantization, (form, bits, *layer))
              for form in ("codebook", "uniform") for bits in (3, 4) for layer in MODELS["llama-3-8b"].values()]
    cases += [(f"static repair, rank {REPAIR_RANK}{', centred' * centred}", layer[0] * layer[1], static_repair, (centred, *layer))
              for centred in (False, True) for layer in MODELS["llama-3-8b"].values()]
    print(f"{'op':32} {'size':>10} {'us':>8} {'spread':>7} {'GB/s':>7}")
    for name, size, make, given in cases:
        calls, moved = make(*given)
        with torch.inference_mode():
            us, spread = time_us(calls)
        row = Row(name, size, round(us, 3), round(spread, 3), round(moved / us / 1e3, 1), torch.cuda.get_device_name())
        print(f"{row.bench:32} {row.size:10d} {row.us:8.2f} {row.spread:7.2f} {row.gbps:7.0f}", flush=True)
        if arguments.json:
            files.append_row(arguments.json, asdict(row))
        del calls
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run(main)
