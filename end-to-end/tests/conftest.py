"""What the tests of this room share: the tiny model, its DecDEC folder, and an answer that takes its time."""

import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from decdec.testing import quick_folder
from decdec.tiny import make_model


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    """The tiny model's own folder. Not to be written to, as ``folder``."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def folder(original) -> Path:
    """The tiny model at 3 bits, with its tokenizer."""
    made = quick_folder(LlamaForCausalLM.from_pretrained(original), original.parent / "tiny-w3")
    AutoTokenizer.from_pretrained(original).save_pretrained(made)
    return made


class _Slow:
    """An answer of many pieces that says how far it came."""

    finish_reason, prompt_tokens, new_tokens, most = "stop", 1, 0, 4000

    def __iter__(self):
        for _ in range(self.most):
            self.new_tokens += 1
            time.sleep(0.005)
            yield "x"


@pytest.fixture
def slow_answers() -> list[_Slow]:
    return [_Slow() for _ in range(3)]
