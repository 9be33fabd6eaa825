"""Choosing the next token on the device: greedy, or sampled with temperature, top-k and top-p from a seed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from decdec.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature: expected a finite number >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k: expected an integer >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: expected a number above 0 and at most 1, got {self.top_p}")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution sampled from, float32 ``(vocab,)``, for ``sampling.temperature`` above 0.

    top_p keeps the likeliest tokens up to and including the one with which their sum reaches it.
    """
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        smallest = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        likely = ordered.softmax(0)
        ordered = ordered.masked_fill(likely.cumsum(0) - likely >= sampling.top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter_(0, order, ordered)
    return logits.softmax(0)


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token, int64 ``(1,)``, from ``logits`` ``(vocab,)``."""
    if sampling.temperature == 0:
        return logits.argmax().view(1)
    # The first of independent exponential clocks with these rates: a draw that never leaves the device.
    clocks = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
    return (probabilities(logits, sampling) / clocks).argmax().view(1)
