"""The token loop: prefill, then one step a token, with the time of both."""

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sampling import Sampling
from stepper import Stepper

AHEAD = 4  # steps a GPU has been given beyond the token that the host reads, so that it never waits for the host


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


class _Chosen:
    """The tokens a stepper has chosen, read without stopping it: on a GPU they are copied as they come."""

    def __init__(self, stepper: Stepper, most: int):
        self.stepper, self.count = stepper, 0
        self.tokens = torch.empty(most, dtype=torch.int64, pin_memory=stepper.on_gpu)
        self.copied: list[torch.cuda.Event] = []

    def take(self) -> None:
        self.tokens[self.count:self.count + 1].copy_(self.stepper.token, non_blocking=True)
        self.count += 1
        if self.stepper.on_gpu:
            self.copied.append(torch.cuda.Event())
            self.copied[-1].record()

    def __getitem__(self, index: int) -> int:
        if self.copied:
            self.copied[index].synchronize()
        return int(self.tokens[index])

    def all(self) -> Tensor:
        self[self.count - 1]
        return self.tokens[:self.count]


def generate(stepper: Stepper, prompt: Tensor, max_new_tokens: int, sampling: Sampling = Sampling(),
             stop: Collection[int] = (), timing: Timing | None = None) -> Iterator[int]:
    """Yield up to ``max_new_tokens`` tokens after ``prompt`` int64 ``(T,)``; ends before a token of ``stop``.

    The caller has checked that all of them fit the model's context. The time the caller spends on a token is not
    counted. On a GPU tokens are read some steps late; what was computed beyond the end is dropped.
    """
    timing = timing or Timing()
    timing.prompt_tokens = len(prompt)
    device, ahead = stepper.token.device, AHEAD if stepper.on_gpu else 0
    stepper.begin(len(prompt) + max_new_tokens, sampling)
    chosen = _Chosen(stepper, max_new_tokens)
    start = time.perf_counter()
    stepper.prefill(prompt.to(device))
    chosen.take()
    chosen.all()
    timing.prefill_s = time.perf_counter() - start
    for count in range(max_new_tokens):
        start = time.perf_counter()
        while chosen.count < min(count + 1 + ahead, max_new_tokens):
            if len(prompt) + chosen.count - 1 == stepper.decoder.rotary.long_from:
                # Longrope turns all keys otherwise once a sequence is this long.
                stepper.prefill(torch.cat((prompt, chosen.all())).to(device))
            else:
                stepper.advance()
            chosen.take()
        token = chosen[count]
        timing.decode_s += time.perf_counter() - start
        timing.steps = count
        if token in stop:
            return
        yield token
