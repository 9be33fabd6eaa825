import itertools
import math

import numpy as np
import phases
import pytest
import quality
from hypothesis import given, settings
from hypothesis import strategies as st
from phases import Setting, phase_1, phase_2, tune

KINDS = ("qkv", "o", "gu", "d")
LIMIT = 5


def exact(low, high):
    """Multiples of 1/64: their sums are exact in any order, so that brute force and tuner cannot differ by rounding."""
    return st.integers(64 * low, 64 * high).map(lambda number: number / 64)


increments = st.lists(st.one_of(st.just(0.0), exact(0, 3)), min_size=0, max_size=6)


@st.composite
def tables(draw):
    """Times that do not fall with k, some ending in "not known"."""
    times = {}
    for kind in KINDS[:draw(st.integers(1, 4))]:
        base = draw(exact(1, 10))
        times[kind] = {}
        for n_tb in draw(st.sets(st.integers(1, LIMIT + 1), min_size=1, max_size=3)):
            curve = list(itertools.accumulate([base + draw(exact(0, 1)), *draw(increments)]))
            times[kind][n_tb] = [base, *curve] + [math.inf] * draw(st.integers(0, 1))
    sizes = {kind: draw(st.integers(1, 100)) for kind in times}
    return times, sizes, sum(next(iter(curves.values()))[0] for curves in times.values()) + draw(exact(0, 12))


def fits_common(times, sizes, budget):
    """Brute force of phase 1: ``{(left out, n_max): (steps, time)}``, every k tried for itself."""
    order = sorted(times, key=lambda kind: sizes[kind], reverse=True)
    found = {}
    for left_out in range(len(order)):
        taking = order[:len(order) - left_out]
        for n_max in range(1, LIMIT + 1):
            n_tb = {kind: [n for n in times[kind] if n <= n_max] for kind in taking}
            if not all(n_tb.values()):
                continue
            for k in range(1, 10):
                total = sum(list(times[kind].values())[0][0] for kind in order if kind not in taking)
                for kind in taking:
                    curve = times[kind][max(n_tb[kind])]
                    total += curve[k] if k < len(curve) else math.inf
                if total <= budget:
                    found[left_out, n_max] = k, total
        if found:
            break
    return found


@settings(max_examples=400, deadline=None)
@given(tables())
def test_phase_1_equals_brute_force(table):
    times, sizes, budget = table
    common, found = phase_1(times, sizes, budget, LIMIT), fits_common(times, sizes, budget)
    if common is None:
        assert not found
        return
    left_out = len(times) - len(common.n_tb)
    steps, time = found[left_out, common.n_max]
    assert steps == common.steps == max(k for k, _ in found.values())
    assert time == min(total for k, total in found.values() if k == steps)


def rounds(times, n_tb, k_chunk, budget):
    """Phase 2, told a second time: whole sums, no bookkeeping."""
    def total(k):
        return sum(times[kind][n_tb[kind]][k[kind]] if kind in n_tb else list(times[kind].values())[0][0]
                   for kind in times)

    def rise(kind):
        curve, k = times[kind][n_tb[kind]], k_chunk[kind]
        return curve[k + 1] - curve[k]

    def one_more(k, kind):
        return {**k, kind: k[kind] + 1}

    while True:
        can = [kind for kind in times if kind in n_tb and k_chunk[kind] + 1 < len(times[kind][n_tb[kind]])]
        order = sorted(can, key=rise)
        before = k_chunk
        for kind in order:
            if total(one_more(k_chunk, kind)) <= budget:
                k_chunk = one_more(k_chunk, kind)
        if k_chunk == before:
            return k_chunk


@settings(max_examples=400, deadline=None)
@given(tables())
def test_phase_2_equals_the_rounds_done_plainly_and_leaves_no_room(table):
    times, sizes, budget = table
    common = phase_1(times, sizes, budget, LIMIT)
    if common is None:
        assert set(tune(times, sizes, budget, LIMIT).values()) == {Setting(1, 0)}
        return
    chosen = phase_2(times, common, budget)
    start = {kind: common.steps if kind in common.n_tb else 0 for kind in times}
    assert {kind: setting.k_chunk for kind, setting in chosen.items()} == rounds(times, common.n_tb, start, budget)
    assert all(chosen[kind].k_chunk == 0 for kind in times if kind not in common.n_tb)


BASE = {"qkv": 20.0, "o": 14.0, "gu": 90.0, "d": 46.0}  # 170 us: a target of 10 % allows 17 more
SIZES = {"qkv": 4096 * 6144, "o": 4096 * 4096, "gu": 4096 * 28672, "d": 14336 * 4096}
CANDIDATES = {"qkv": (1, 2, 3, 4, 5, 6, 8, 12, 24), "o": (1, 2, 3, 4, 6, 8, 16), "d": (*range(1, 15), 16),
              "gu": (*range(1, 15), 16, 19, 23, 28, 38, 56, 112)}


def worked_example():
    """A table of the shape of the paper's example (56 SMs): time rises from a knee that comes later the more blocks
    fetch, and beyond 24 blocks the base GEMV of gate/up lacks SMs."""
    slope = {"qkv": 0.9, "o": 0.8, "gu": 0.25, "d": 0.35}
    times = {}
    for kind, base in BASE.items():
        times[kind] = {n: [base, *(base + slope[kind] * max(0, k - min(12, n)) + 8 * (n > 24) for k in range(1, 60))]
                       for n in CANDIDATES[kind]}
    return times


def test_the_worked_example_of_the_paper():
    """56 SMs and 10 %: n_max 24 of 1..28, 19 steps, then rounds that raise gu and d while qkv and o stay at 19."""
    times, budget = worked_example(), 1.1 * sum(BASE.values())
    for kind in ("qkv", "gu"):  # at fewer blocks these two lag, so that n_max = 24 wins as in the example
        for n in times[kind]:
            if n < 23:
                times[kind][n] = [times[kind][n][0], *(us + 2 for us in times[kind][n][1:])]
    common = phase_1(times, SIZES, budget, 28)
    assert (common.n_max, common.steps) == (24, 19)
    assert common.n_tb == {"qkv": 24, "o": 16, "gu": 23, "d": 16}
    chosen = phase_2(times, common, budget)
    assert {kind: setting.k_chunk for kind, setting in chosen.items()} == {"qkv": 19, "o": 19, "gu": 21, "d": 20}


def test_the_smallest_matrix_is_left_out_where_nothing_fits():
    times = {"o": {1: [5.0, 9.0, 9.0]}, "gu": {1: [30.0, 30.0, 31.0]}}
    assert tune(times, {"o": 1, "gu": 2}, 1.05 * 35, 4) == {"o": Setting(1, 0), "gu": Setting(1, 2)}


def test_nothing_fits_at_all():
    assert set(tune({"o": {1: [5.0, 9.0]}}, {"o": 1}, 5.1, 4).values()) == {Setting(1, 0)}


def test_candidates_beyond_the_limit_are_not_used():
    assert tune({"o": {1: [5.0, 5.1], 8: [5.0, 5.0, 5.0]}}, {"o": 1}, 5.5, 4) == {"o": Setting(1, 1)}


@st.composite
def problems(draw):
    times, sizes, budget = draw(tables())
    gains = {kind: [0.0, *itertools.accumulate(draw(st.lists(st.floats(0, 5), min_size=9, max_size=9)))]
             for kind in times}
    return times, sizes, gains, budget


def every_choice(times, gains, budget):
    """Brute force: the largest gain of all settings of all kinds that fit."""
    options = []
    for kind, curves in times.items():
        options.append([(curve[k], gains[kind][k])
                        for n, curve in curves.items() if n <= LIMIT for k in range(len(curve))]
                       or [(next(iter(curves.values()))[0], 0.0)])
    fitting = [sum(g for _, g in combination) for combination in itertools.product(*options)
               if sum(t for t, _ in combination) <= budget]
    return max(fitting, default=None)


def total(times, chosen):
    return sum(times[kind][setting.n_tb][setting.k_chunk] if setting.k_chunk else next(iter(times[kind].values()))[0]
               for kind, setting in chosen.items())


@settings(max_examples=150, deadline=None)
@given(problems())
def test_equals_brute_force_and_keeps_the_budget(problem):
    times, _, gains, budget = problem
    chosen = quality.tune(times, gains, budget, LIMIT)
    assert total(times, chosen) <= budget
    worth = sum(gains[kind][setting.k_chunk] for kind, setting in chosen.items())
    assert worth == pytest.approx(every_choice(times, gains, budget))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_never_predicts_less_than_the_papers_phases(problem):
    times, sizes, gains, budget = problem
    ours, papers = quality.tune(times, gains, budget, LIMIT), phases.tune(times, sizes, budget, LIMIT)
    worth = [sum(gains[kind][setting.k_chunk] for kind, setting in chosen.items()) for chosen in (ours, papers)]
    assert worth[0] >= worth[1] - 1e-9


def test_many_classes_stay_near_the_optimum():
    """One class a block: the thinned front loses next to nothing against the fractional bound."""
    random = np.random.default_rng(0)
    times, gains = {}, {}
    for block in range(40):
        times[block] = {4: [1.0, *(1.0 + 0.02 * random.random() * k for k in range(1, 40))]}
        gains[block] = np.concatenate([[0], np.cumsum(np.sort(random.random(39))[::-1] * random.random())])
    budget = 40 * 1.1
    chosen = quality.tune(times, gains, budget, LIMIT)
    assert total(times, chosen) <= budget
    # Lagrangian bound: best over a few prices of time.
    bound = min(price * (budget - 40)
                + sum(max(gains[b][k] - price * (times[b][4][k] - 1) for k in range(40)) for b in times)
                for price in np.geomspace(0.1, 100, 60))
    assert sum(gains[b][setting.k_chunk] for b, setting in chosen.items()) > 0.99 * bound


def test_so_many_classes_that_fronts_are_short(monkeypatch):
    """What adds nothing is never thinned away: with it everything fits."""
    monkeypatch.setattr(quality, "FRONTS", 120)
    times = {block: {4: [1.0, *(1.0 + 0.001 * k for k in range(1, 40))]} for block in range(60)}
    chosen = quality.tune(times, {block: list(range(40)) for block in times}, 60.1, LIMIT)
    assert total(times, chosen) <= 60.1 and any(setting.k_chunk for setting in chosen.values())


def test_unknown_times_and_no_room():
    assert quality.tune({"o": {1: [5.0, math.inf, 5.2]}}, {"o": [0, 1, 2]}, 5.5, 4) == {"o": Setting(1, 2)}
    assert quality.tune({"o": {1: [5.0, 9.0]}}, {"o": [0, 1]}, 5.5, 4) == {"o": Setting(1, 0)}
    assert quality.tune({"o": {8: [5.0, 5.0]}}, {"o": [0, 1]}, 5.5, 4) == {"o": Setting(1, 0)}
