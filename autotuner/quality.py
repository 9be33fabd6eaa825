"""Phase 3, ours: the settings that remove most predicted loss within a time budget.

The paper's phases count steps as if every channel of every layer were worth the same and cost the same. Here a layer
type's k_chunk is worth the loss it is predicted to remove (:mod:`gains`), and costs the best time over all n_tb.
Choosing one setting for each type is then a knapsack with one item of each class; types are few, so it is solved by
merging Pareto fronts.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from phases import Setting, Times

# Fronts longer than this are thinned to the best setting in each of so many steps of time. Four types stay well below
# it (and so are solved exactly); with one class a block it bounds the loss of time to a few thousandths of the budget.
FRONT = 20_000


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
    time, gain = np.zeros(1), np.zeros(1)
    steps = []  # for each type: (previous front's index, this type's k_chunk) of every point of the front
    options = {}
    for key, curves in times.items():
        options[key] = least, n_tb = fastest({n: curve if n <= n_limit else curve[:1] for n, curve in curves.items()})
        worth = np.asarray(gains[key], dtype=np.float64)[:len(least)]
        least, n_tb = least[:len(worth)], n_tb[:len(worth)]
        sums = (time[:, None] + least[None, :]).ravel()
        total = (gain[:, None] + worth[None, :]).ravel()
        kept = _front(sums, total, budget)
        time, gain = sums[kept], total[kept]
        steps.append((key, kept // len(least), kept % len(least)))
        if not len(time):
            return {key: Setting(1, 0) for key in times}
    chosen, point = {}, len(time) - 1
    for key, previous, k_chunk in reversed(steps):
        k = int(k_chunk[point])
        chosen[key] = Setting(int(options[key][1][k]) if k else 1, k)
        point = previous[point]
    return {key: chosen[key] for key in times}


def _front(time: np.ndarray, gain: np.ndarray, budget: float) -> np.ndarray:
    """Indices of the Pareto front within ``budget``, by rising time and strictly rising gain."""
    inside = np.flatnonzero(time <= budget)
    order = inside[np.lexsort((-gain[inside], time[inside]))]
    rising = gain[order] > np.concatenate([[-np.inf], np.maximum.accumulate(gain[order])[:-1]])
    front = order[rising]
    if len(front) > FRONT:
        bins = np.floor(time[front] / budget * FRONT)
        front = front[np.append(bins[1:] != bins[:-1], True)]  # the last of a bin has its largest gain
    return front
