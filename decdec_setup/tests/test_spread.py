"""Blocks given to several devices in turn, and inputs computed again to save memory: the same tensors as without."""

import threading
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from decdec.models import load_model, load_tokenizer
from decdec.text import calibration_samples, load_text

import awq
import squeezellm
from blocks import BlockRunner, in_turn


def test_results_come_in_turn_while_the_next_job_is_prepared():
    prepared, first = [], threading.Event()

    def work(number):
        # Job 0 ends only once job 1 is at work, so both must run at a time.
        assert first.wait(5) if number == 0 else first.set() is None
        return number

    def jobs():
        for number in range(5):
            prepared.append(number)
            yield lambda number=number: work(number)

    results = in_turn(jobs(), 2)
    assert next(results) == 0 and prepared == [0, 1] and list(results) == [1, 2, 3, 4]
    assert list(in_turn(iter([lambda: 7]), 1)) == [7]
    with pytest.raises(ZeroDivisionError):
        list(in_turn(iter([lambda: 1, lambda: 1 / 0]), 2))


@pytest.mark.parametrize("method", ["awq", "squeezellm"])
def test_two_devices_and_inputs_made_again_change_nothing(tiny, method, monkeypatch):
    tokens = calibration_samples(load_text("pydoc", "calibration"), load_tokenizer(str(tiny)), 2, 32, 0)

    def blocks(devices):
        runner = BlockRunner(load_model(str(tiny)), tokens)
        runner.devices = devices
        found = awq.quantize_blocks(runner, [3, 3], 64, {0, 1}) if method == "awq" \
            else squeezellm.quantize_blocks(runner, [3, 3], {0, 1})
        return dict(found)

    wanted = blocks([torch.device("cpu")])
    calls = []
    forward = squeezellm._forward
    monkeypatch.setattr(squeezellm, "_forward", lambda *args: calls.append(args[1]) or forward(*args))
    monkeypatch.setattr(squeezellm, "HIDDEN_BYTES", 0)
    found = blocks([torch.device("cpu", 0), torch.device("cpu", 0)])
    assert calls == ([0, 1, 0] if method == "squeezellm" else [])
    assert wanted.keys() == found.keys() == {0, 1}
    for index, tensors in wanted.items():
        assert tensors.keys() == found[index].keys()
        assert all(torch.equal(tensor, found[index][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("count", [1, 2, 5, 7])
@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_no_more_inputs_wait_than_counted(count, limit, monkeypatch):
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=count, vocab_size=64)
    runner = BlockRunner(AutoModelForCausalLM.from_config(config), torch.arange(16).view(1, 16))
    made, alive = [], []
    forward, embed, copy_block = squeezellm._forward, runner.embed, runner.copy_block

    def remember(states):
        made.append(weakref.ref(states[0]))
        return states

    def counted(index):
        alive.append(sum(state() is not None for state in made))
        return copy_block(index)

    monkeypatch.setattr(squeezellm, "HIDDEN_BYTES", limit)
    monkeypatch.setattr(squeezellm, "_forward", lambda *args: remember(forward(*args)))
    monkeypatch.setattr(runner, "embed", lambda: remember(embed()))
    monkeypatch.setattr(runner, "copy_block", counted)
    assert len(list(squeezellm.quantize_blocks(runner, [3] * count, set(range(count))))) == count
    assert max(alive) == squeezellm.waiting_bytes(count, 1, limit)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("method", ["awq", "squeezellm"])
def test_two_gpus_give_the_tensors_of_one(tiny, method):
    tokens = calibration_samples(load_text("pydoc", "calibration"), load_tokenizer(str(tiny)), 2, 32, 0)

    def blocks(device):
        runner = BlockRunner(load_model(str(tiny)), tokens, device)
        return dict(awq.quantize_blocks(runner, [3, 3], 64, {0, 1}) if method == "awq"
                    else squeezellm.quantize_blocks(runner, [3, 3], {0, 1}))

    one, two = blocks("cuda:0"), blocks("cuda")
    assert all(torch.equal(tensor, two[index][name]) for index, tensors in one.items() for name, tensor in tensors.items())
