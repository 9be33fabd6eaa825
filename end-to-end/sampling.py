"""Choosing the next token on the device: greedy, or sampled with temperature, top-k and top-p from a seed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from decdec import decode_ops
from decdec.errors import UserError

FLOAT32 = torch.finfo(torch.float32)
COLD = 1e-6  # temperatures below are greedy: logits divided by them soon leave float32


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature <= FLOAT32.max:
            raise UserError(f"temperature: expected a finite number >= 0, got {self.temperature}")
        if not 0 <= self.top_k < 2**63:
            raise UserError(f"top_k: expected an integer >= 0 of at most 63 bits, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: expected a number above 0 and at most 1, got {self.top_p}")
        if not -2**63 <= self.seed < 2**63:
            raise UserError(f"seed: expected an integer of at most 64 bits, got {self.seed}")


def probabilities(logits: Tensor, temperature: Tensor | float, top_k: Tensor | int, top_p: Tensor | float) -> Tensor:
    """The distribution sampled from, float32 ``(vocab,)``, for a ``temperature`` above 0.

    Kept are the ``top_k`` likeliest tokens with all equal to the last of them, and of these the likeliest up to and
    including the one with which their sum reaches ``top_p``.
    """
    ordered, order = (logits.float() / temperature).sort(descending=True)
    last = torch.as_tensor(top_k, device=logits.device).clamp(1, len(ordered)) - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(0, last.view(1)), -torch.inf)
    likely = ordered.softmax(0)
    ordered = ordered.masked_fill(likely.cumsum(0) - likely >= top_p, -torch.inf)
    return torch.empty_like(ordered).scatter_(0, order, ordered.softmax(0))


class Sampler:
    """Draws tokens as a :class:`Sampling` says. Its numbers lie on the device, so that a captured graph serves all."""

    def __init__(self, device: torch.device | str):
        self.generator = torch.Generator(device)
        self.temperature = torch.ones((), device=device)
        self.top_k = torch.ones((), dtype=torch.int64, device=device)
        self.top_p = torch.ones((), device=device)
        self.workspace = torch.zeros(16, dtype=torch.uint8, device=device)
        self.form = "greedy"

    def set(self, sampling: Sampling, vocabulary: int) -> None:
        """Take new settings and begin the draws of their seed."""
        cut = 0 < sampling.top_k < vocabulary or sampling.top_p < 1
        self.form = "greedy" if sampling.temperature < COLD else "cut" if cut else "whole"
        self.temperature.fill_(sampling.temperature or 1.0)
        self.top_k.fill_(sampling.top_k or vocabulary)
        self.top_p.fill_(max(sampling.top_p, FLOAT32.tiny))
        self.generator.manual_seed(sampling.seed)

    def next_token(self, logits: Tensor) -> Tensor:
        """The next token, int64 ``(1,)``, from ``logits`` ``(vocab,)``."""
        if self.form == "greedy":
            return decode_ops.argmax(logits[None], self.workspace)
        if self.form == "cut":
            likely = probabilities(logits, self.temperature, self.top_k, self.top_p)
        else:
            likely = (logits.float() / self.temperature).softmax(0)
        # The first of independent exponential clocks with these rates: a draw that never leaves the device.
        clocks = torch.empty_like(likely).exponential_(generator=self.generator)
        return decode_ops.argmax((likely / clocks)[None], self.workspace)
