"""From a table of times and a target to the settings of every layer type."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import phases
import quality
from phases import Setting
from shapes import Layer
from timings import Timings

SCOPES = ("kernel", "end-to-end")
OBJECTIVES = ("quality", "paper")


@dataclass(frozen=True)
class Target:
    """An allowed slow-down. ``percent`` of what: the linear layers' kernels (the paper's), or a whole token.

    ``rest_us`` is the time of a token outside the linear layers; only the end-to-end scope looks at it.
    """

    percent: float
    scope: str = "kernel"
    rest_us: float = 0.0

    def budget(self, base_us: float) -> float:
        """Microseconds a token's linear layers may take, their base time being ``base_us``."""
        rest = self.rest_us if self.scope == "end-to-end" else 0.0
        return base_us + self.percent / 100 * (base_us + rest)

    def slowdown_percent(self, base_us: float, compensated_us: float) -> float:
        rest = self.rest_us if self.scope == "end-to-end" else 0.0
        return 100 * (compensated_us - base_us) / (base_us + rest)


def total_us(timings: Timings, settings: Mapping[Layer, Setting] | None = None) -> float:
    """Time of all linear layers of a token, base alone where no settings are given."""
    if settings is None:
        return sum(layer.count * timings.base(layer) for layer in timings.layers)
    return sum(layer.count * timings.time(layer, setting.n_tb, setting.k_chunk) for layer, setting in settings.items())


def decide(timings: Timings, target: Target, gains: Mapping[Layer, Sequence[float]] | None,
           n_limit: int) -> dict[Layer, Setting]:
    """The best settings for ``target``: by the predicted ``gains``, or without them by the paper's two phases.

    The paper tunes one bit width at a time (a mixed model's two separately, to the same target); with gains all layers
    share one budget. ``n_limit``: the largest n_tb, half of the SMs in the paper.
    """
    times = timings.times()
    base = total_us(timings)
    if gains is not None:
        return quality.tune(times, gains, target.budget(base), n_limit)
    settings = {}
    for bits in sorted({layer.bits for layer in timings.layers}):
        part = {layer: curves for layer, curves in times.items() if layer.bits == bits}
        share = sum(layer.count * timings.base(layer) for layer in part) / base
        sizes = {layer: layer.d_in * layer.d_out for layer in part}
        settings |= phases.tune(part, sizes, target.budget(base) * share, n_limit)
    return {layer: settings[layer] for layer in timings.layers}
