"""Time of decoding: warm-up, runs, their median and spread, and what the GPU's memory delivered."""

import statistics
import time
from dataclasses import dataclass

import torch

from decdec import hub
from sampling import Sampling
from stepper import Stepper


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


def measure(stepper: Stepper, prompt_tokens: int, new_tokens: int, runs: int, warm_up: int = 1,
            sampling: Sampling = Sampling()) -> Measured:
    """Decode ``new_tokens`` after a random prompt of ``prompt_tokens``, ``warm_up + runs`` times."""
    device = stepper.token.device
    synchronize = torch.cuda.synchronize if stepper.on_gpu else lambda: None
    if stepper.on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(len(stepper.decoder.head.weight), (prompt_tokens,), generator=generator).to(device)
    times, prefill_times = [], []
    for _ in range(warm_up + runs):
        stepper.begin(prompt_tokens + new_tokens, sampling)
        synchronize()
        start = time.perf_counter()
        stepper.prefill(prompt)
        synchronize()
        read = time.perf_counter()
        for _ in range(new_tokens):
            stepper.advance()
        synchronize()
        times.append((time.perf_counter() - read) * 1e3 / new_tokens)
        prefill_times.append((read - start) * 1e3)
    memory = hub.memory(stepper.decoder)
    embedding = stepper.decoder.embed.weight
    tied = embedding is stepper.decoder.head.weight
    return Measured(tuple(times[warm_up:]), statistics.median(prefill_times[warm_up:]),
                    memory["device_bytes"] - (0 if tied else embedding.nbytes),
                    torch.cuda.max_memory_allocated(device) if stepper.on_gpu else 0, memory["host_bytes"])
