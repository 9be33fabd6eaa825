import dataclasses
import random

import analytic
import pytest
from decide import Target, decide, total_us
from profiling import BEHIND, SPREAD, Profiler, Sample, coarse_points, measure_coarsely, refine
from settle import AGREE, settle
from shapes import random_weights
from timings import Conditions, Timings, envelope, interpolated, read_profile, timing_row

from decdec.errors import UserError
from decdec.files import append_row, read_rows

HERE = Conditions("fake", 60, "abc", "float16", "bucket")
RATES = analytic.Rates(500, 25, 60)
LAYERS = random_weights("llama-3-8b", 3, "codebook").layers
GAINS = {layer: [k**0.5 * layer.d_in for k in range(1025)] for layer in LAYERS}


class FakeTimer:
    """The analytic model with noise; ``drift`` slows every compensated time by that share."""

    def __init__(self, noise=0.0, drift=0.0, spread=0.0):
        self.noise, self.drift, self.spread, self.calls, self.random = noise, drift, spread, 0, random.Random(0)

    def time(self, layer, n_tb, k_chunk):
        self.calls += 1
        us = analytic.compensated_us(layer, n_tb, k_chunk, RATES) * (1 + self.random.uniform(-1, 1) * self.noise)
        return Sample(us * (1 + self.drift * (k_chunk > 0)), self.spread, 31)


def profiled(path, timer, rows=()):
    timings = Timings(LAYERS, HERE, rows)
    profiler = Profiler(timings, timer, path)
    for layer in LAYERS:
        profiler.measure(layer, 0, 0)
        points = coarse_points(layer, timings.base(layer), RATES.dram_gb_s, RATES.link_gb_s, 30)
        measure_coarsely(profiler, layer, points)
    return profiler


def test_saved_rows_are_not_measured_again(tmp_path):
    first, second = FakeTimer(), FakeTimer()
    timings = profiled(tmp_path / "rows.jsonl", first).timings
    rows = read_profile(tmp_path / "rows.jsonl")
    again = profiled(tmp_path / "rows.jsonl", second, rows).timings
    assert first.calls == len(rows) and second.calls == 0
    assert again.points == timings.points


@pytest.mark.parametrize("change", [{"sms": 30}, {"device": "other"}, {"library": "new"}, {"selection": "exact"},
                                    {"dtype": "bfloat16"}])
def test_rows_of_other_conditions_are_not_used(tmp_path, change):
    row = timing_row(dataclasses.replace(HERE, **change), LAYERS[0], 0, 0, 5.0, 0.0, 31)
    with pytest.raises(UserError, match="no base time of qkv"):
        Timings(LAYERS, HERE, [row]).base(LAYERS[0])


def test_a_wide_spread_is_measured_again_and_told(tmp_path, capsys):
    timer = FakeTimer(spread=2 * SPREAD)
    profiler = Profiler(Timings(LAYERS, HERE), timer, tmp_path / "rows.jsonl")
    profiler.measure(LAYERS[0], 0, 0)
    profiler.warn_if_noisy()
    assert timer.calls == 3 and "something else uses this GPU" in capsys.readouterr().err


@pytest.mark.parametrize("gains", [None, GAINS], ids=["paper", "quality"])
@pytest.mark.parametrize("percent", [2.5, 5, 10, 20])
def test_the_choice_rests_on_measured_points_and_its_fresh_time_keeps_the_target(tmp_path, gains, percent):
    profiler = profiled(tmp_path / "rows.jsonl", FakeTimer(noise=0.002))
    timings = profiler.timings
    settled = settle(timings, profiler, lambda table, target: decide(table, target, gains, 30), Target(percent))
    assert all(setting.k_chunk == 0 or timings.measured(layer, setting.n_tb, setting.k_chunk)
               for layer, setting in settled.settings.items())
    assert 0 < settled.measured_percent <= percent
    assert settled.predicted_percent == pytest.approx(settled.measured_percent, abs=1)
    assert any(setting.k_chunk for setting in settled.settings.values())


def test_the_coarse_profile_finds_what_a_full_one_finds(tmp_path):
    profiler = profiled(tmp_path / "rows.jsonl", FakeTimer())
    full = Timings(LAYERS, HERE)
    for layer in LAYERS:
        full.add(layer, 0, 0, analytic.base_us(layer, RATES))
        for n_tb in profiler.timings.points[layer]:
            for k in range(1, 201) if n_tb else ():
                full.add(layer, n_tb, k, analytic.compensated_us(layer, n_tb, k, RATES))
    for gains in (None, GAINS):
        def decision(table, gains=gains):
            return decide(table, Target(10), gains, 30)
        refine(profiler, [decision])
        found, best = decision(profiler.timings), decision(full)
        for layer in LAYERS:
            assert abs(found[layer].k_chunk - best[layer].k_chunk) <= 2, (layer, found[layer], best[layer])


def test_a_base_time_above_the_laws_reaches_further():
    """A base GEMV as long as the link takes for 100 channels: its coarse points go on to 200."""
    layer = LAYERS[0]
    base_us = 100 * layer.residual_bytes(1024) / 1024 / (25 * 1e3)
    points = coarse_points(layer, base_us, 500, 25, 30)
    assert sorted({k for _, k in points}) == [1, 12, 25, 50, 75, 100, 150, 200]


def test_a_slow_n_tb_is_not_followed(tmp_path):
    class Bar:
        seen = 0

        def update(self):
            self.seen += 1

    timer, bar = FakeTimer(), Bar()
    profiler = Profiler(Timings(LAYERS, HERE), timer, tmp_path / "rows.jsonl", bar)
    layer = LAYERS[2]
    profiler.measure(layer, 0, 0)
    points = coarse_points(layer, profiler.timings.base(layer), RATES.dram_gb_s, RATES.link_gb_s, 30)
    measure_coarsely(profiler, layer, points)
    curves = profiler.timings.points[layer]
    assert timer.calls < bar.seen == 1 + len(points)
    every = sorted({k for _, k in points})
    best = {k: min(curve[k] for curve in curves.values() if k in curve) for k in every}
    for n_tb, curve in curves.items():
        ks = sorted(curve) if n_tb else []
        assert ks == every[:len(ks)]
        assert all(curve[k] <= BEHIND * best[k] for k in ks[:-1])
        assert len(ks) == len(every) or not n_tb or curve[ks[-1]] > BEHIND * best[ks[-1]]
    assert set(every) == set(curves[16]) and len(curves[1]) < len(every)


def test_times_that_come_out_longer_are_answered_by_fetching_less(tmp_path):
    """Profile on an idle GPU, tune on a slower one: the first choice misses the target, the last keeps it and uses it."""
    profiler = profiled(tmp_path / "rows.jsonl", FakeTimer())
    profiler = Profiler(profiler.timings, FakeTimer(drift=0.03), tmp_path / "rows.jsonl")
    settled = settle(profiler.timings, profiler, lambda table, target: decide(table, target, GAINS, 30), Target(5))
    assert 4 < settled.measured_percent <= 5


def test_where_nothing_keeps_the_target_nothing_is_compensated(tmp_path):
    """A decision that never learns: the fastest it was offered still takes too long."""
    profiler = profiled(tmp_path / "rows.jsonl", FakeTimer())
    always = decide(profiler.timings, Target(50), GAINS, 30)
    settled = settle(profiler.timings, profiler, lambda table, target: always, Target(5))
    assert settled.measured_percent == settled.predicted_percent == 0
    assert not any(setting.k_chunk for setting in settled.settings.values())


@pytest.mark.parametrize("gains", [None, GAINS], ids=["paper", "quality"])
def test_short_times_now_and_then_lead_to_plans_that_hold(tmp_path, gains):
    """One time in thirty comes out a tenth too short and the others within 1 %: choices seek out the short ones."""
    class Erring(FakeTimer):
        def time(self, *point):
            sample = super().time(*point)
            return dataclasses.replace(sample, us=sample.us * (0.9 if self.random.random() < 1 / 30 else 1))

    profiler = profiled(tmp_path / "rows.jsonl", Erring(noise=0.01))
    exact = FakeTimer()
    for percent in (2.5, 5, 10, 20):
        settled = settle(profiler.timings, profiler, lambda table, target: decide(table, target, gains, 30), Target(percent))
        assert settled.measured_percent <= percent
        assert settled.predicted_percent == pytest.approx(settled.measured_percent, abs=1)
        base, compensated = (sum(layer.count * exact.time(layer, setting.n_tb, setting.k_chunk if fetched else 0).us
                                 for layer, setting in settled.settings.items()) for fetched in (False, True))
        assert 0.5 * percent - 1 < 100 * (compensated / base - 1) < percent + 1


def test_a_choice_that_rests_on_a_time_too_short_is_made_again(tmp_path):
    """One point of the profile came out as fast as the base: it is chosen first, and found out when it is measured afresh."""
    profiler = profiled(tmp_path / "rows.jsonl", FakeTimer())
    timings, layer = profiler.timings, LAYERS[0]
    n_tb = max(timings.points[layer], key=lambda n_tb: len(timings.points[layer][n_tb]))
    wrong = max(timings.points[layer][n_tb]) - 1
    timings.add(layer, n_tb, wrong, timings.base(layer))
    chosen = []

    def decision(table, target):
        chosen.append(decide(table, dataclasses.replace(target, percent=15), GAINS, 30))
        return chosen[-1]

    settled = settle(timings, profiler, decision, Target(90))
    assert chosen[0][layer].k_chunk == wrong > settled.settings[layer].k_chunk
    assert settled.predicted_percent == pytest.approx(settled.measured_percent, abs=AGREE)


def test_a_choice_at_the_end_of_the_range_makes_it_longer(tmp_path):
    timings = Timings(LAYERS[:1], HERE)
    profiler = Profiler(timings, FakeTimer(), tmp_path / "rows.jsonl")
    for k in (0, 1, 4):
        profiler.measure(LAYERS[0], 4, k)
    refine(profiler, [lambda table: decide(table, Target(10), None, 30)])
    chosen, = decide(timings, Target(10), None, 30).values()
    assert 4 < chosen.k_chunk < max(timings.points[LAYERS[0]][4])


def test_end_to_end_allows_the_rest_its_share():
    target = Target(5, "end-to-end", rest_us=300.0)
    assert target.budget(700.0) == pytest.approx(750.0)
    assert target.slowdown_percent(700.0, 750.0) == pytest.approx(5)
    assert Target(5, "kernel", 300.0).budget(700.0) == pytest.approx(735.0)


def test_mixed_bits_are_tuned_apart_by_the_paper_and_together_by_gains(tmp_path):
    layers = random_weights("llama-3-8b", 3.5, "codebook").layers
    timings = Timings(layers, HERE)
    for layer in layers:
        for n_tb in (0, 4, 8):
            for k in range(0, 90) if n_tb else (0,):
                timings.add(layer, n_tb, k, analytic.compensated_us(layer, n_tb, k, RATES))
    base = total_us(timings)
    papers = decide(timings, Target(5), None, 30)
    for bits in (3, 4):
        part = {layer: setting for layer, setting in papers.items() if layer.bits == bits}
        assert total_us(timings, part) <= 1.05 * sum(layer.count * timings.base(layer) for layer in part)
    worth_more_at_3 = {layer: [k**0.5 * (4 - layer.bits) for k in range(1025)] for layer in layers}
    ours = decide(timings, Target(5), worth_more_at_3, 30)
    assert total_us(timings, ours) <= 1.05 * base
    assert all(setting.k_chunk == 0 or layer.bits == 3 or worth_more_at_3[layer][1] for layer, setting in ours.items())
    assert {layer.count for layer in layers} == {16}


@pytest.mark.parametrize("layer", LAYERS, ids=[layer.kind for layer in LAYERS])
def test_the_fixed_cost_is_found_in_the_points(layer):
    points = [(k, analytic.compensated_us(layer, 4, k, RATES)) for k in range(1, 200)]
    found = analytic.fitted_fixed_us(layer, points, analytic.base_us(layer, RATES), RATES.link_gb_s)
    assert found == pytest.approx(RATES.fixed_us)
    assert analytic.fitted_fixed_us(layer, [], 10.0, RATES.link_gb_s) == 0


def test_missing_and_falling_times():
    assert interpolated({2: 12.0, 4: 16.0}, 10.0).tolist() == [10.0, float("inf"), 12.0, 14.0, 16.0]
    assert interpolated({}, 10.0).tolist() == [10.0]
    assert envelope(interpolated({1: 12.0, 2: 15.0, 3: 11.0, 4: 16.0}, 11.5)).tolist() == [11.5, 11.0, 11.0, 11.0, 16.0]
    assert envelope(interpolated({2: 12.0}, 10.0)).tolist() == [10.0, 12.0, 12.0]


@pytest.mark.parametrize("row, says", [({"what": "dance"}, "row 1"), ([1], "row 1"),
                                       ({"what": "rates", "device": "fake", "sms": 60}, "rates without library"),
                                       ({"what": "timing", "device": "fake"}, None)])
def test_a_profile_that_is_none_is_refused(tmp_path, row, says):
    append_row(tmp_path / "rows.jsonl", row)
    if says:
        with pytest.raises(UserError, match=says):
            read_profile(tmp_path / "rows.jsonl")
    else:  # a row of other conditions that misses fields harms nothing
        Timings(LAYERS, HERE, read_rows(tmp_path / "rows.jsonl"))


def test_a_profile_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "rows").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "rows"):
        with pytest.raises(UserError, match="expected a file of JSON lines"):
            read_profile(path)


def test_a_garbled_row_of_this_device_is_named():
    row = timing_row(HERE, LAYERS[0], 4, 8, 5.0, 0.0, 31)
    with pytest.raises(UserError, match="garbles"):
        Timings(LAYERS, HERE, [{**row, "us": "fast"}])
    with pytest.raises(UserError, match="positive time"):
        Timings(LAYERS, HERE, [{**row, "us": float("nan")}])
