"""Time of decoding: warm-up, runs, their median and spread, and what the GPU's memory delivered."""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import decdec
from decdec import hub
from decdec.artifacts import FORMATS
from decdec.errors import UserError
from decdec.files import append_row
from decdec.reference import chunk_counts
from decdec.sizes import NAMED
from decoder import Decoder
from random_model import give_residuals, random_decoder
from runtime import describe, device_and_dtype
from runtime_arguments import compensation_of, make_runtime
from sampling import Sampling
from step_profile import profile, table
from stepper import Stepper

WARM_UP_TOKENS = 32  # enough for allocators, graphs and clocks to settle


@dataclass(frozen=True)
class Measured:
    """Milliseconds of a token in every run, and bytes: read by a token, peak on the GPU, pinned on the host."""

    ms: tuple[float, ...]
    prefill_ms: float
    read_bytes: int
    peak_bytes: int
    pinned_bytes: int

    @property
    def ms_per_token(self) -> float:
        return statistics.median(self.ms)

    def row(self) -> dict:
        """The measured part of a result row; the spread is that of the middle half of the runs."""
        low, _, high = statistics.quantiles(self.ms, n=4) if len(self.ms) > 1 else self.ms * 3
        return {"ms_per_token": round(self.ms_per_token, 4), "spread_ms": round(high - low, 4), "runs": len(self.ms),
                "tokens_per_s": round(1e3 / self.ms_per_token, 1), "prefill_ms": round(self.prefill_ms, 2),
                "gb_per_s": round(self.read_bytes / self.ms_per_token / 1e6, 1), "peak_bytes": self.peak_bytes,
                "pinned_bytes": self.pinned_bytes}


def measure(stepper: Stepper, prompt_tokens: int, new_tokens: int, runs: int,
            sampling: Sampling = Sampling()) -> Measured:
    """Decode ``new_tokens`` after a random prompt of ``prompt_tokens``, ``runs`` times, after a shorter time to warm up."""
    device = stepper.token.device
    synchronize = torch.cuda.synchronize if stepper.on_gpu else lambda: None
    if stepper.on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    prompt = random_prompt(stepper, prompt_tokens)
    times, prefill_times = [], []
    for tokens in (min(WARM_UP_TOKENS, new_tokens), *[new_tokens] * runs):
        stepper.begin(prompt_tokens + new_tokens, sampling)
        synchronize()
        start = time.perf_counter()
        stepper.prefill(prompt)
        synchronize()
        read = time.perf_counter()
        for _ in range(tokens):
            stepper.advance()
        synchronize()
        times.append((time.perf_counter() - read) * 1e3 / tokens)
        prefill_times.append((read - start) * 1e3)
    return Measured(tuple(times[1:]), statistics.median(prefill_times[1:]), read_bytes(stepper.decoder),
                    torch.cuda.max_memory_allocated(device) if stepper.on_gpu else 0, hub.memory(stepper.decoder)["host_bytes"])


def read_bytes(decoder: Decoder) -> int:
    """What a token reads of the device's memory besides the cache: all weights, of the embedding nothing to speak of, and of
    residuals that lie there the rows that are chosen."""
    embedding = decoder.embed.weight
    read = hub.memory(decoder)["device_bytes"] - (0 if embedding is decoder.head.weight else embedding.nbytes)
    for layer in hub.compensated_layers(decoder).values():
        if layer.compensation.k_chunk and layer.residual_in == "gpu":
            left_out = layer.in_features - sum(chunk_counts(layer.in_features, layer.compensation.k_chunk))
            read -= left_out * (layer.residual.nbytes // layer.in_features)
    return read


def random_prompt(stepper: Stepper, tokens: int) -> Tensor:
    """The same random token ids int64 ``(tokens,)`` in every run, on the stepper's device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(len(stepper.decoder.head.weight), (tokens,), generator=generator).to(stepper.token.device)


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measuring")
    group.add_argument("--benchmark", action="store_true", help="measure decoding: warm-up, runs, median, spread")
    group.add_argument("--profile", action="store_true", help="one token's time by kernel")
    group.add_argument("--random-weights", choices=tuple(NAMED), help="a known model's shapes instead of --model")
    group.add_argument("--bits", type=float, default=3, help="of random weights: 2 to 4, or 3.5 (default 3)")
    group.add_argument("--format", default="codebook", choices=FORMATS, help="of random weights (default codebook)")
    group.add_argument("--prompt-tokens", type=int, default=16, metavar="N", help="of the random prompt (default 16)")
    group.add_argument("--runs", "--num_samples", type=int, default=10, metavar="N", help="default 10")
    group.add_argument("--sweep", type=int, nargs="+", metavar="K", help="these k_chunk one after the other")
    group.add_argument("--out", metavar="ROWS.jsonl", help="append a row for every setting")


def run_benchmark(arguments: argparse.Namespace, sampling: Sampling) -> None:
    """Measure what the arguments ask for; rows go to stdout, and to ``--out``."""
    for name in ("runs", "prompt_tokens"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected a positive number, got {getattr(arguments, name)}")
    swept = [argparse.Namespace(**vars(arguments) | {"k_chunk": [k_chunk]}) for k_chunk in arguments.sweep or ()]
    settings = [compensation_of(one) for one in swept or [arguments]]
    stepper, what = _random(arguments) if arguments.random_weights else _of_model(arguments)
    for setting in settings:
        if arguments.sweep or arguments.random_weights:
            hub.set_compensation(stepper.decoder, setting, arguments.residuals)
            stepper.settings_changed()
        settings_of = what | describe(stepper.decoder)
        versions = {"torch": torch.__version__, "decdec": decdec.__version__}
        rows = []
        if arguments.benchmark:
            measured = measure(stepper, arguments.prompt_tokens, arguments.max_new_tokens or 200, arguments.runs,
                               sampling=sampling)
            rows.append(settings_of | {"sampling": asdict(sampling)} | measured.row() | versions | {
                "prompt_tokens": arguments.prompt_tokens, "new_tokens": arguments.max_new_tokens or 200})
            print(json.dumps(rows[0]), flush=True)
        if arguments.profile:
            seen = profile(stepper, random_prompt(stepper, arguments.prompt_tokens), sampling)
            rows += [settings_of | {"bench": "profile"} | row | versions for row in seen]
            print(table(seen), flush=True)
        if arguments.out:
            append_row(arguments.out, *rows)


def _random(arguments: argparse.Namespace) -> tuple[Stepper, dict]:
    device, dtype = device_and_dtype(arguments.device, arguments.dtype)
    try:
        decoder = random_decoder(arguments.random_weights, arguments.bits, arguments.format, dtype, device,
                                 arguments.head_bits)
        if max(arguments.sweep or arguments.k_chunk or [0]):
            give_residuals(decoder, arguments.residuals)
    except torch.OutOfMemoryError:
        raise UserError(f"random-weights: {arguments.random_weights} at {arguments.bits:g} bits does not fit the "
                        f"memory of {device}") from None
    return Stepper(decoder), {"bench": "decode", "shapes": arguments.random_weights,
                              "method": f"random {arguments.format}", "bits": arguments.bits}


def _of_model(arguments: argparse.Namespace) -> tuple[Stepper, dict]:
    if arguments.model is None:
        raise UserError("--model: expected a model to measure, or --random-weights")
    runtime = make_runtime(arguments)
    what = {"bench": "decode", "shapes": Path(arguments.model).resolve().name, "method": "original", "bits": 16}
    if runtime.quantized:
        bits = {layer.bits for layer in hub.compensated_layers(runtime.decoder).values()}
        what |= {"method": runtime.decoder.decdec.quant.method, "bits": sum(bits) / len(bits)}
    return runtime.stepper, what
