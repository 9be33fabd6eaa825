"""The paper's tuner (section 4.4), phases 1 and 2, on plain numbers.

``times[key][n_tb][k]`` is the time of a layer type ``key`` with ``n_tb`` fetching blocks and k_chunk ``k``, k = 0, 1,
...; entry 0 is the base GEMV alone. Times must not fall as k grows (:func:`timings.envelope` sees to it); infinity is
"not known".
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from candidates import largest_candidate

Times = Mapping[Hashable, Mapping[int, Sequence[float]]]


@dataclass(frozen=True)
class Setting:
    """What is chosen for one layer type. Where ``k_chunk`` is 0 nothing is fetched and ``n_tb`` means nothing."""

    n_tb: int
    k_chunk: int


@dataclass(frozen=True)
class Common:
    """What phase 1 finds: ``n_max``, the ``steps`` that one common k_chunk could rise, and n_tb of the types that take
    part."""

    n_max: int
    steps: int
    n_tb: dict[Hashable, int]


def time_at(times: Times, key: Hashable, n_tb: int, k_chunk: int) -> float:
    curve = times[key][n_tb]
    return curve[k_chunk] if k_chunk < len(curve) else math.inf


def base_time(times: Times, key: Hashable) -> float:
    return next(iter(times[key].values()))[0]


def phase_1(times: Times, sizes: Mapping[Hashable, int], budget: float, n_limit: int) -> Common | None:
    """For each n_max up to ``n_limit`` every type takes its largest candidate, and one common k_chunk rises while the
    sum of all times stays within ``budget``; the n_max with most steps wins (then the lower time, then the smaller
    n_max).

    Where no n_max permits a step, the type of the smallest of ``sizes`` is left out with k_chunk 0, and the rest tried
    again. None if nothing permits a step.
    """
    active = sorted(times, key=lambda key: sizes[key], reverse=True)
    while active:
        idle = sum(base_time(times, key) for key in times if key not in active)
        best = best_rank = None
        for n_max in range(1, n_limit + 1):
            n_tb = {key: largest_candidate(list(times[key]), n_max) for key in active}
            if None in n_tb.values():
                continue

            def total(k_chunk: int) -> float:
                return idle + sum(time_at(times, key, n_tb[key], k_chunk) for key in active)

            steps = 0
            while total(steps + 1) <= budget:
                steps += 1
            if steps and (best is None or (steps, -total(steps)) > best_rank):
                best, best_rank = Common(n_max, steps, n_tb), (steps, -total(steps))
        if best:
            return best
        active.pop()
    return None


def phase_2(times: Times, common: Common, budget: float) -> dict[Hashable, Setting]:
    """From the common k_chunk, rounds of +1 for each type, the smallest rise in time first, as long as the sum stays
    within ``budget``; ends with a round that changes nothing. Types that phase 1 left out stay at 0."""
    k_chunk = {key: common.steps if key in common.n_tb else 0 for key in times}
    now = {key: time_at(times, key, common.n_tb[key], k_chunk[key]) if key in common.n_tb else base_time(times, key)
           for key in times}
    changed = True
    while changed:
        changed = False
        after = {key: time_at(times, key, common.n_tb[key], k_chunk[key] + 1) for key in times if key in common.n_tb}
        for key in sorted(after, key=lambda key: after[key] - now[key]):
            if sum(now.values()) - now[key] + after[key] <= budget:
                now[key], changed = after[key], True
                k_chunk[key] += 1
    return {key: Setting(common.n_tb.get(key, 1), k_chunk[key]) for key in times}


def tune(times: Times, sizes: Mapping[Hashable, int], budget: float, n_limit: int) -> dict[Hashable, Setting]:
    """Both phases; ``k_chunk`` 0 everywhere if the budget permits nothing."""
    common = phase_1(times, sizes, budget, n_limit)
    if common is None:
        return {key: Setting(1, 0) for key in times}
    return phase_2(times, common, budget)
