"""Which points are measured: coarsely everywhere, finely around the answer, and nothing twice."""

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import analytic
from candidates import n_tb_candidates
from phases import Setting
from shapes import Layer
from timings import Timings, shape_of, timing_row
from tqdm import tqdm

from decdec.files import append_row
from decdec.reference import CHUNK

COARSE = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 3 / 2, 2)  # of the knee; the paper too looks up to twice the knee
SPREAD = 0.02  # samples spread wider are taken again: a target of 2.5 % cannot be tuned with noise of that size
TRIES = 3
NOISY = 0.1  # share of such timings that is told: on an idle H100 4 % of them, where few blocks fetch for long
ROUNDS = 30
BEHIND = 2.0  # a n_tb so many times slower than another at the same k_chunk is not followed to larger ones
USUAL = 16  # n_tb that serves most shapes well (8 to 16 in the paper): the nearest are measured first


@dataclass(frozen=True)
class Sample:
    """Median of ``samples`` timings in microseconds; ``spread`` is their interquartile range over it."""

    us: float
    spread: float
    samples: int


class Timer(Protocol):
    def time(self, layer: Layer, n_tb: int, k_chunk: int) -> Sample:
        """Time of one layer with a cold L2; ``k_chunk`` 0 is the base GEMV alone."""


class Profiler:
    """Measures points of ``timings`` with ``timer``, and appends each to the rows at ``path``. What it measures replaces what saved
    rows said of a point."""

    def __init__(self, timings: Timings, timer: Timer, path: str | Path, bar: tqdm | None = None):
        self.timings, self.timer, self.path, self.bar = timings, timer, path, bar
        self.taken = self.noisy = 0
        self.fresh: set[tuple] = set()  # points that were measured here, not read from saved rows

    def measure(self, layer: Layer, n_tb: int, k_chunk: int, again: bool = False) -> Sample | None:
        """Measure a point unless it is known (None then), or ``again`` in any case. Wide spreads are measured once
        more."""
        n_tb = n_tb if k_chunk else 0
        if not again and self.timings.measured(layer, n_tb, k_chunk):
            self.skip()
            return None
        best = self.timer.time(layer, n_tb, k_chunk)
        for _ in range(TRIES - 1):
            if best.spread <= SPREAD:
                break
            best = min(best, self.timer.time(layer, n_tb, k_chunk), key=lambda sample: sample.spread)
        self.taken, self.noisy = self.taken + 1, self.noisy + (best.spread > SPREAD)
        append_row(self.path, timing_row(self.timings.conditions, layer, n_tb, k_chunk, best.us, best.spread,
                                         best.samples))
        self.timings.add(layer, n_tb, k_chunk, best.us, anew=self.is_stale(layer, n_tb, k_chunk))
        self.fresh.add((shape_of(layer), n_tb, k_chunk))
        self.skip()
        return best

    def is_stale(self, layer: Layer, n_tb: int, k_chunk: int) -> bool:
        """Whether what is known of a point comes from saved rows alone, measured under clocks that may have been others."""
        return (shape_of(layer), n_tb if k_chunk else 0, k_chunk) not in self.fresh

    def skip(self) -> None:
        """Count a point that needs no further measuring."""
        if self.bar is not None:
            self.bar.update()

    def warn_if_noisy(self) -> None:
        if self.noisy > NOISY * self.taken:
            print(f"warning: {self.noisy} of {self.taken} timings spread by more than {SPREAD:.0%} even after {TRIES} "
                  "tries: something else uses this GPU or its clocks move; close it and profile again into a new file",
                  file=sys.stderr)


def coarse_points(layer: Layer, base_us: float, dram_gb_s: float, link_gb_s: float,
                  n_limit: int) -> list[tuple[int, int]]:
    """``(n_tb, k_chunk)`` for every candidate n_tb, up to twice the knee: the law's, or where the measured base time
    ends."""
    by_time = base_us * 1e3 * link_gb_s / max(1, layer.residual_bytes(CHUNK)) * CHUNK
    knee = max(analytic.knee(layer.bits, layer.residual_bits, dram_gb_s, link_gb_s), by_time)
    k_chunks = sorted({1} | {min(CHUNK, max(1, round(part * knee))) for part in COARSE})
    return [(n_tb, k) for n_tb in n_tb_candidates(layer.d_in, layer.d_out) if n_tb <= n_limit for k in k_chunks]


def measure_coarsely(profiler: Profiler, layer: Layer, points: Sequence[tuple[int, int]]) -> None:
    """Measure ``points`` of :func:`coarse_points`, but none of a n_tb that has fallen ``BEHIND``, where most of the time
    would go."""
    k_chunks = defaultdict(list)
    for n_tb, k_chunk in points:
        k_chunks[n_tb].append(k_chunk)
    fastest = {}
    for n_tb in sorted(k_chunks, key=lambda n_tb: abs(n_tb - USUAL)):
        behind = False
        for k_chunk in sorted(k_chunks[n_tb]):
            if behind:
                profiler.skip()
                continue
            profiler.measure(layer, n_tb, k_chunk)
            us = profiler.timings.points[layer][n_tb][k_chunk]
            fastest[k_chunk] = min(us, fastest.get(k_chunk, us))
            behind = us > BEHIND * fastest[k_chunk]


def refine(profiler: Profiler, decisions: Sequence[Callable[[Timings], Mapping[Layer, Setting]]],
           rounds: int = ROUNDS, afresh: bool = False) -> None:
    """Measure what each of ``decisions`` chooses, and one channel to either side, until it chooses only what was
    measured, ``afresh`` if it is to be by this profiler, for at most so many ``rounds``.

    A choice at the end of the measured range makes the range half as long again.
    """
    timings = profiler.timings
    for decision in decisions:
        for _ in range(rounds):
            missing = []
            for layer, setting in decision(timings).items():
                if setting.k_chunk == 0:
                    continue
                last = max(timings.points[layer][setting.n_tb])
                beyond = [min(CHUNK, last + max(2, last // 2))] if setting.k_chunk >= last else []
                around = [k for k in (setting.k_chunk - 1, setting.k_chunk, setting.k_chunk + 1) if 0 < k <= last]
                missing += [(layer, setting.n_tb, k) for k in around + beyond
                            if not timings.measured(layer, setting.n_tb, k)]
                if afresh and profiler.is_stale(layer, setting.n_tb, setting.k_chunk):
                    missing.append((layer, setting.n_tb, setting.k_chunk))
            if not missing:
                break
            for layer, n_tb, k_chunk in missing:
                profiler.measure(layer, n_tb, k_chunk, again=afresh and profiler.is_stale(layer, n_tb, k_chunk))
