"""End-to-end targets against a made-up runtime, in which every compensated layer costs something of its own."""

import analytic
import numpy as np
import pytest
from decide import Target, decide, total_us
from phases import Setting
from settle_token import InToken, exposed_by_kind, settle_token
from shapes import random_weights
from timings import Conditions, Timings

HERE = Conditions("fake", 60, "abc", "float16", "exact")
RATES = analytic.Rates(2000, 50, 60)
HIDDEN = {("qkv", 3): 4.0, ("o", 3): 6.0, ("gu", 3): -1.5, ("d", 3): 0.0}  # microseconds a compensated layer
REST = 800.0


def table(each_block=False):
    timings = Timings(random_weights("llama-3-8b", 3, "codebook", each_block).layers, HERE)
    for layer in timings.layers[:4]:
        for n_tb in (0, 4, 8):
            for k in range(1, 60) if n_tb else (0,):
                timings.add(layer, n_tb, k, analytic.compensated_us(layer, n_tb, k, RATES))
    return timings


def runtime(timings, factor=1.0):
    """A token's slow-down in percent; what its kernels add counts ``factor`` times."""
    token_us = total_us(timings) + REST

    def token_percent(settled):
        added = sum(layer.count * (factor * (settled.predicted[layer] - settled.base[layer])
                                   + HIDDEN[layer.kind, layer.bits])
                    for layer, setting in settled.settings.items() if setting.k_chunk)
        token_percent.asked += 1
        return 100 * added / token_us

    token_percent.asked = 0
    return token_percent


def test_each_kind_is_asked_once_and_what_it_costs_is_found():
    for each_block in (False, True):
        timings = table(each_block)
        asked = runtime(timings)
        found = exposed_by_kind(timings, Target(5, "end-to-end", REST), 30, asked)
        assert asked.asked == 4 and found == pytest.approx(HIDDEN, abs=1e-6)


def test_a_kind_that_was_never_profiled_is_not_asked():
    timings = Timings(table().layers[:1], HERE)
    timings.add(timings.layers[0], 0, 0, 5.0)
    assert exposed_by_kind(timings, Target(5, "end-to-end", REST), 30, runtime(timings)) == {}


def test_times_in_a_token():
    timings = table()
    in_token, plain = InToken(timings, HIDDEN), timings.times()
    for layer, curves in in_token.times().items():
        for n_tb, curve in curves.items():
            assert curve[0] == plain[layer][n_tb][0] == layer.count * timings.base(layer)
            later = plain[layer][n_tb][1:] + layer.count * HIDDEN[layer.kind, 3]
            assert np.array_equal(curve[1:], np.maximum(later, curve[0]))
    gate_up = timings.layers[2]
    assert in_token.time(gate_up, 8, 1) == timings.base(gate_up) == in_token.base(gate_up)
    assert total_us(in_token, {gate_up: Setting(8, 50)}) == pytest.approx(32 * (timings.time(gate_up, 8, 50) - 1.5))


@pytest.mark.parametrize("factor", [1.0, 0.7, 1.6])
@pytest.mark.parametrize("percent", [2.5, 5, 10, 20])
def test_the_target_is_met_in_few_rounds(factor, percent):
    timings = table(each_block=True)
    gains = {layer: [k**0.5 for k in range(1025)] for layer in timings.layers}
    target, asked = Target(percent, "end-to-end", REST), runtime(timings, factor)
    exposed = exposed_by_kind(timings, target, 30, asked)
    settled, ratio = settle_token(timings, None, lambda table, target: decide(table, target, gains, 30), target, asked,
                                  exposed)
    assert percent - 1 < settled.measured_percent <= percent and asked.asked <= 4 + 4
    assert settled.predicted_percent == pytest.approx(settled.measured_percent, abs=0.5)
    if factor == 1.0:
        assert ratio == pytest.approx(1, abs=0.01) and asked.asked == 4 + 1


def test_a_target_that_permits_nothing_compensates_nothing():
    timings = table()
    gains = {layer: [float(k) for k in range(1025)] for layer in timings.layers}
    target, asked = Target(0.01, "end-to-end", REST), runtime(timings)
    expensive = dict.fromkeys(HIDDEN, 50.0)
    settled, _ = settle_token(timings, None, lambda table, target: decide(table, target, gains, 30), target, asked,
                              expensive)
    assert settled.measured_percent == 0 and asked.asked == 0
    assert all(setting.k_chunk == 0 for setting in settled.settings.values())


def test_an_overlap_that_is_not_there_is_given_up():
    """Where asking about a kind went wrong, its kernels seem to cost a token nothing."""
    timings = table(each_block=True)
    gains = {layer: [k**0.5 for k in range(1025)] for layer in timings.layers}
    target, asked = Target(5, "end-to-end", REST), runtime(timings)
    settled, _ = settle_token(timings, None, lambda table, target: decide(table, target, gains, 30), target, asked,
                              dict.fromkeys(HIDDEN, -60.0))
    assert 4 < settled.measured_percent <= 5
    assert settled.predicted_percent == pytest.approx(settled.measured_percent, abs=0.5)


def test_where_no_choice_keeps_the_target_nothing_is_compensated():
    timings = table()
    always = dict.fromkeys(timings.layers, Setting(8, 40))
    settled, _ = settle_token(timings, None, lambda table, target: always, Target(1, "end-to-end", REST),
                              runtime(timings), HIDDEN)
    assert settled.measured_percent == 0 and not any(setting.k_chunk for setting in settled.settings.values())
