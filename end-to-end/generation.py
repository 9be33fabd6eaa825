"""The token loop: prefill, then one step a token, with the time of both."""

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from decoder import Decoder
from sampling import Sampling, next_token


@dataclass
class Timing:
    """Filled by :func:`generate` as it goes: prompt tokens and their seconds, decode steps and theirs."""

    prompt_tokens: int = 0
    prefill_s: float = 0.0
    steps: int = 0
    decode_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return self.steps / self.decode_s if self.decode_s else 0.0


def generate(decoder: Decoder, prompt: Tensor, max_new_tokens: int, sampling: Sampling = Sampling(),
             stop: Collection[int] = (), timing: Timing | None = None) -> Iterator[int]:
    """Yield up to ``max_new_tokens`` tokens after ``prompt`` int64 ``(T,)``; ends before a token of ``stop``.

    The caller has checked that all of them fit the model's context. The time the caller spends on a token is not
    counted.
    """
    timing = timing or Timing()
    timing.prompt_tokens = len(prompt)
    generator = torch.Generator(prompt.device).manual_seed(sampling.seed)
    decoder.allocate(len(prompt) + max_new_tokens)
    start = time.perf_counter()
    logits = decoder.prefill(prompt)
    timing.prefill_s = time.perf_counter() - start
    position = torch.tensor([len(prompt)], device=prompt.device)
    for count in range(max_new_tokens):
        token = next_token(logits, sampling, generator)
        chosen = int(token)
        if chosen in stop:
            return
        yield chosen
        if count + 1 < max_new_tokens:
            start = time.perf_counter()
            logits = decoder.step(token, position, len(prompt) + count + 1)
            position += 1
            timing.decode_s += time.perf_counter() - start
            timing.steps += 1
