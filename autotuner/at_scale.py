"""Predict what residual forms cost on the paper's GPUs: time a token against k_chunk, bytes fetched, CPU memory.

From shapes and data-sheet figures alone, by the analytic model (analytic.py) with the fixed costs that an H100 showed: one JSON
line for each model, base format, GPU and form, marked as predicted. A token is its linear layers, each with its best n_tb, and the
read of the output head.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import analytic
from candidates import n_tb_candidates
from datasheet import GPUS
from shapes import Layer, random_weights
from simulated import simulated_rates

from decdec import packing
from decdec.errors import run
from decdec.files import append_row, atomic

K_CHUNKS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
FORMS = ((4, False), (3, True), (2, True), (1, True))  # residual bits, nested


def best_us(layer: Layer, k_chunk: int, rates: analytic.Rates) -> float:
    """Time of the layer with the n_tb, of at most half of the SMs, that serves it best."""
    n_tbs = [n for n in n_tb_candidates(layer.d_in, layer.d_out) if n <= max(1, rates.sms // 2)]
    return min(analytic.compensated_us(layer, n_tb, k_chunk, rates) for n_tb in n_tbs)


def rows(models: list[str], gpus: list[str], bits: int) -> Iterator[dict]:
    for model in models:
        for format in ("codebook", "uniform"):
            shapes = random_weights(model, bits, format)
            for residual_bits, nested in FORMS:
                layers = [replace(layer, residual_bits=residual_bits, nested=nested) for layer in shapes.layers]
                host = sum(layer.count * layer.d_in * packing.residual_row_bytes(layer.d_out, residual_bits) for layer in layers)
                for gpu in gpus:
                    rates = simulated_rates(GPUS[gpu])
                    head = shapes.head_bytes / (rates.dram_gb_s * 1e3)
                    token = [head + sum(layer.count * best_us(layer, k, rates) for layer in layers) for k in K_CHUNKS]
                    yield {"bench": "at scale", "predicted": True, "model": model, "format": format, "bits": bits, "gpu": gpu,
                           "residual_bits": residual_bits, "nested": nested, "host_bytes": host, "k_chunk": K_CHUNKS,
                           "ms_per_token": [round(us / 1e3, 4) for us in token],
                           "fetched_bytes": [sum(layer.count * layer.residual_bytes(k) for layer in layers) for k in K_CHUNKS]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["llama-3-8b", "llama-3-70b"], help="shapes (default llama-3-8b llama-3-70b)")
    parser.add_argument("--gpu", nargs="+", default=list(GPUS), choices=list(GPUS), help="GPUs of the paper (default all)")
    parser.add_argument("--bits", type=int, default=3, help="of the base weights (default 3)")
    parser.add_argument("--out", default="autotuner/results/at_scale.jsonl", help="JSON-lines file to write, anew")
    arguments = parser.parse_args()
    found = list(rows(arguments.model, arguments.gpu, arguments.bits))
    with atomic(arguments.out) as temporary:
        for row in found:
            append_row(temporary, row)
    print(f"wrote {len(found)} predictions to {arguments.out}")


if __name__ == "__main__":
    run(main)
