"""End-to-end targets: have a runtime measure a token under the choice, and choose again until the two agree.

A token's slow-down is not the sum of its kernels'. On an H100 (2026-11-23) a compensated layer among others that are not
costs a token 4 to 18 us more than its kernel takes by itself, most likely because the code of two GEMVs takes turns in the
instruction cache. So the runtime is asked first what each kind of layer really costs, one kind at a time, and what comes on
top of its kernel's time counts for every layer that is compensated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from decide import Target, total_us
from phases import Setting
from profiling import Profiler, refine
from quality import fastest
from settle import AGREE, Decision, Settled, aim, nothing, predicted
from shapes import Layer
from timings import Timings

ATTEMPTS = 6
ROUNDS = 1  # of refinement before a choice: a token says more about it than one more kernel
PROBED = 8  # k_chunk at which a kind of layer is compensated to see what it costs

TokenPercent = Callable[[Settled], float]


@dataclass(frozen=True)
class InToken:
    """``timings`` as they count in a token: a compensated layer takes ``exposed[kind, bits]`` microseconds more."""

    timings: Timings
    exposed: Mapping[tuple[str, int], float]

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.timings.layers

    def base(self, layer: Layer) -> float:
        return self.timings.base(layer)

    def times(self) -> dict[Layer, dict[int, np.ndarray]]:
        """As :meth:`Timings.times`; never below the base time."""
        return {layer: {n_tb: np.append(curve[:1], np.maximum(curve[1:] + layer.count * self._of(layer), curve[0]))
                        for n_tb, curve in curves.items()} for layer, curves in self.timings.times().items()}

    def time(self, layer: Layer, n_tb: int, k_chunk: int) -> float:
        us = self.timings.time(layer, n_tb, k_chunk)
        return us if k_chunk == 0 else max(self.base(layer), us + self._of(layer))

    def _of(self, layer: Layer) -> float:
        return self.exposed.get((layer.kind, layer.bits), 0.0)


def exposed_by_kind(timings: Timings, target: Target, n_limit: int,
                    token_percent: TokenPercent) -> dict[tuple[str, int], float]:
    """For each kind and bit width, what a token takes for every compensated layer beyond its kernel's own rise:
    microseconds, below 0 where kernels overlap."""
    exposed, times = {}, timings.times()
    for kind in dict.fromkeys((layer.kind, layer.bits) for layer in timings.layers):
        layers = [layer for layer in timings.layers if (layer.kind, layer.bits) == kind]
        least, n_tb = fastest({n: curve for n, curve in times[layers[0]].items() if n <= n_limit})
        known = np.flatnonzero(np.isfinite(least[1:])) + 1
        if not len(known):
            continue
        k_chunk = known[min(np.searchsorted(known, PROBED), len(known) - 1)]
        probe = dict.fromkeys(timings.layers, Setting(1, 0)) | dict.fromkeys(layers, Setting(int(n_tb[k_chunk]),
                                                                                         int(k_chunk)))
        settled = predicted(timings, probe, target)
        beyond = token_percent(settled) - settled.predicted_percent
        token_us = total_us(timings) + target.rest_us
        exposed[kind] = beyond / 100 * token_us / sum(layer.count for layer in layers)
    return exposed


def settle_token(timings: Timings, profiler: Profiler | None, decision: Decision, target: Target,
                 token_percent: TokenPercent, exposed: Mapping[tuple[str, int], float],
                 ratio: float = 1.0) -> tuple[Settled, float]:
    """Choose for an end-to-end ``target`` and have a runtime measure it (``token_percent``), until the choice keeps the
    target and the runtime agrees with the prediction within ``AGREE`` points.

    ``exposed`` as :func:`exposed_by_kind` found it. The ``ratio`` of measured to predicted corrects what it misses; the
    last one is returned too, for the next target to begin with. Where nothing agrees, the choice that keeps the target
    most closely is taken, and where none keeps it, nothing is compensated.
    """
    keeping = []
    for _ in range(ATTEMPTS):
        allowed = replace(target, percent=aim(target) / ratio)
        if profiler is not None:
            refine(profiler, [lambda table, allowed=allowed: decision(InToken(table, exposed), allowed)], ROUNDS)
        in_token = InToken(timings, exposed)
        settings = dict(decision(in_token, allowed))
        expected = predicted(in_token, settings, target).predicted_percent
        settled = replace(predicted(timings, settings, target), predicted_percent=ratio * expected)
        if not any(setting.k_chunk for setting in settings.values()):
            break
        settled = replace(settled, measured_percent=token_percent(settled))
        keeps = settled.measured_percent <= target.percent
        if keeps:
            keeping.append(settled)
        agrees = abs(settled.measured_percent - settled.predicted_percent) <= AGREE
        if expected > 0:
            ratio = max(0.1, settled.measured_percent / expected, 0.0 if keeps else 1.02 * ratio)
        elif not keeps:  # the overlap that was seen when its kind was asked about is not there
            exposed = {kind: max(0.0, us) for kind, us in exposed.items()}
        if keeps and agrees:
            return settled, ratio
    best = max(keeping, key=lambda settled: settled.measured_percent) if keeping else nothing(timings, target)
    return best, ratio
