"""Phase 3, ours: the settings that remove most predicted loss within a time budget.

The paper's phases count steps as if every channel of every layer were worth the same and cost the same. Here a layer
type's k_chunk is worth the loss it is predicted to remove (:mod:`gains`), and costs the best time over all n_tb.
Choosing one setting for each type is then a knapsack with one item of each class; types are few, so it is solved by
merging Pareto fronts. With one class a block of the model, fronts are thinned to stay quick.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from phases import Setting, Times

# Fronts longer than this over the number of types are thinned to the best setting in each of so many steps of the time
# that may be added. Four types stay below it, and so are solved exactly; with one a block, 120 of them, a decision
# takes a second and removes 0.1 % less than with fronts four times as long.
FRONTS = 60_000


def fastest(curves: Mapping[int, Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """For each k_chunk the least time over all n_tb, and the n_tb that reaches it: float64 and int64 ``(K + 1,)``."""
    n_tbs, length = sorted(curves), max(len(curve) for curve in curves.values())
    padded = np.full((len(n_tbs), length), np.inf)
    for row, n_tb in zip(padded, n_tbs):
        row[:len(curves[n_tb])] = curves[n_tb]
    best = padded.argmin(axis=0)
    return padded[best, np.arange(length)], np.array(n_tbs)[best]


def tune(times: Times, gains: Mapping[Hashable, Sequence[float]], budget: float,
         n_limit: int) -> dict[Hashable, Setting]:
    """The settings of largest total gain whose times sum to at most ``budget``, n_tb up to ``n_limit``.

    ``gains[key][k]`` is the loss removed at k_chunk ``k``, 0 at k = 0, not falling. Of equal gains the least time is
    taken. ``k_chunk`` 0 everywhere if the budget permits nothing.
    """
    room = budget - sum(next(iter(curves.values()))[0] for curves in times.values())
    if room < 0:
        return {key: Setting(1, 0) for key in times}
    longest = FRONTS // len(times)
    time, gain = np.zeros(1), np.zeros(1)  # added to the base times, and removed from the loss
    chosen_from = []  # for each type: its options (k_chunk, n_tb), and of every point of the front where it came from
    for key, curves in times.items():
        least, n_tb = fastest({n: curve if n <= n_limit else curve[:1] for n, curve in curves.items()})
        worth = np.asarray(gains[key], dtype=np.float64)[:len(least)]
        added = least[:len(worth)] - least[0]
        own = _front(added, worth, room, longest)
        kept = _front((time[:, None] + added[own]).ravel(), (gain[:, None] + worth[own]).ravel(), room, longest)
        before, option = np.divmod(kept, len(own))
        time, gain = time[before] + added[own][option], gain[before] + worth[own][option]
        chosen_from.append((key, before, own[option], n_tb))
    chosen, point = {}, len(time) - 1
    for key, before, k_chunk, n_tb in reversed(chosen_from):
        k = int(k_chunk[point])
        chosen[key] = Setting(int(n_tb[k]) if k else 1, k)
        point = before[point]
    return {key: chosen[key] for key in times}


def _front(time: np.ndarray, gain: np.ndarray, room: float, longest: int) -> np.ndarray:
    """Indices of the Pareto front within ``room``, by rising time and strictly rising gain, at most ``longest``."""
    inside = np.flatnonzero(time <= room)
    order = inside[np.lexsort((-gain[inside], time[inside]))]
    rising = gain[order] > np.concatenate([[-np.inf], np.maximum.accumulate(gain[order])[:-1]])
    front = order[rising]
    if len(front) > longest:
        bins = np.floor(time[front] / room * longest)
        kept = np.append(bins[1:] != bins[:-1], True)  # the last of a bin has its largest gain
        kept[0] = True  # adding nothing always fits
        front = front[kept]
    return front
