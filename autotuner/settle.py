"""From a target to settings that hold: choose, measure the choice afresh, and choose again with less if it takes too
long."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from decide import Target
from phases import Setting
from profiling import Profiler, refine
from shapes import Layer
from timings import Timings, shape_of

# With noise of 1 % and one time in thirty a tenth too short, 2 or 3 do mostly, and 1 of 128 choices took them all.
ATTEMPTS = 12
AGREE = 0.5  # points between a predicted and a measured slow-down
FRESH = 3  # fresh measurements of base and choice, taken in turn so that both see the same clocks

Decision = Callable[[Timings, Target], Mapping[Layer, Setting]]


@dataclass(frozen=True)
class Settled:
    """Settings, with times of one layer in microseconds; ``measured`` is None where nothing was measured afresh."""

    settings: dict[Layer, Setting]
    base: dict[Layer, float]
    predicted: dict[Layer, float]
    measured: dict[Layer, float] | None
    predicted_percent: float
    measured_percent: float | None


def settle(timings: Timings, profiler: Profiler | None, decision: Decision, target: Target,
           afresh: bool = True) -> Settled:
    """Choose for ``target``; with a ``profiler`` measure the choice ``afresh`` until it keeps the target and was predicted within
    ``AGREE`` points, which fresh times bring about, since they count in the table. Where that is never both, the choice nearest to
    its prediction of those that keep the target is taken, and where none keeps it, nothing is compensated.

    Without a profiler, the choice rests on the saved rows alone. A simulation has nothing to measure afresh.
    """
    if profiler is not None and not afresh:
        refine(profiler, [lambda table: decision(table, target)])
    if profiler is None or not afresh:
        return predicted(timings, dict(decision(timings, target)), target)
    allowed, keeping = replace(target, percent=aim(target)), []
    for attempt in range(ATTEMPTS):
        refine(profiler, [lambda table, allowed=allowed: decision(table, allowed)], afresh=True)
        settled = _measured(timings, profiler, dict(decision(timings, allowed)), target)
        excess = settled.measured_percent - target.percent
        if excess > 0:
            # Mostly the table has learnt better from the fresh times. Where it has not, or not from many, less is to be chosen.
            learnt = predicted(timings, settled.settings, target).predicted_percent > allowed.percent
            if not learnt or attempt >= ATTEMPTS // 2:
                allowed = replace(allowed, percent=max(0.0, allowed.percent - 1.1 * excess))
            continue
        keeping.append(settled)
        if _apart(settled) <= AGREE:
            return settled
    return min(keeping, key=_apart) if keeping else nothing(timings, target)


def aim(target: Target) -> float:
    """A slow-down a little below that of ``target``, so that noise does not carry a choice over it."""
    return target.percent - min(AGREE / 2, 0.1 * target.percent)


def nothing(timings: Timings, target: Target) -> Settled:
    """The choice that keeps every target: nothing is compensated."""
    return replace(predicted(timings, dict.fromkeys(timings.layers, Setting(1, 0)), target), measured_percent=0.0)


def _apart(settled: Settled) -> float:
    return abs(settled.measured_percent - settled.predicted_percent)


def _measured(timings: Timings, profiler: Profiler, settings: dict[Layer, Setting], target: Target) -> Settled:
    before = predicted(timings, settings, target)
    base, measured, fresh = {}, {}, {}
    for layer, setting in settings.items():
        same = shape_of(layer), setting
        if same not in fresh:
            pairs = [(profiler.measure(layer, 0, 0, again=True).us,
                      profiler.measure(layer, setting.n_tb, setting.k_chunk, again=True).us) for _ in range(FRESH)]
            fresh[same] = [sorted(times)[FRESH // 2] for times in zip(*pairs)]
        base[layer], measured[layer] = fresh[same]
        if setting.k_chunk == 0:
            measured[layer] = base[layer]
    percent = target.slowdown_percent(_total(base), _total(measured))
    return replace(before, measured=measured, measured_percent=percent)


def predicted(timings: Timings, settings: dict[Layer, Setting], target: Target) -> Settled:
    """What the table of times says of ``settings``."""
    base = {layer: timings.base(layer) for layer in settings}
    times = {layer: timings.time(layer, setting.n_tb, setting.k_chunk) for layer, setting in settings.items()}
    return Settled(settings, base, times, None, target.slowdown_percent(_total(base), _total(times)), None)


def _total(us: Mapping[Layer, float]) -> float:
    return sum(layer.count * time for layer, time in us.items())
