"""The queue and its thread: callers that go away, requests that fail, the same text as without them."""

import asyncio

import pytest
import torch

from answering import LanguageModel
from decdec.linear import Compensation
from engine import Busy, Engine
from runtime import Runtime
from sampling import Sampling


def test_who_goes_away_frees_the_engine_and_failures_end_only_their_own_request(slow_answers):
    async def scene():
        engine = Engine(limit=3)
        first, second = engine.submit(lambda: slow_answers[0]), engine.submit(lambda: slow_answers[1])
        pieces = first.pieces()
        assert await anext(pieces) == "x"
        third = engine.submit(lambda: 1 / 0)
        engine.submit(lambda: slow_answers[2])
        with pytest.raises(Busy, match="3 requests are waiting"):
            engine.submit(lambda: slow_answers[2])
        second.cancel()  # before its turn
        first.cancel()  # midway
        with pytest.raises(ZeroDivisionError):
            [piece async for piece in third.pieces()]
        assert 0 < slow_answers[0].new_tokens < slow_answers[0].most and slow_answers[1].new_tokens == 0
        assert engine.alive

    asyncio.run(scene())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])
def test_its_thread_gives_what_this_one_gives(folder, device):
    model = LanguageModel(Runtime(folder, Compensation(8, "exact"), device))
    asked = [(model.encode(text), Sampling(temperature, seed=5)) for text in ("Once", "x" * 300)
             for temperature in (0, 1)]
    want = ["".join(model.answer(prompt, 40, sampling)) for prompt, sampling in asked]

    async def scene():
        engine, found = Engine(limit=64), []
        jobs = [engine.submit(lambda given=given: model.answer(given[0], 40, given[1])) for given in asked * 5]
        for number, job in enumerate(jobs):
            pieces = job.pieces()
            if number % 3 == 1:  # goes away midway
                await anext(pieces)
                job.cancel()
            else:
                found.append((number % len(want), "".join([piece async for piece in pieces])))
        return found

    found = asyncio.run(scene())
    assert len(found) == 13 and all(text == want[number] for number, text in found)
