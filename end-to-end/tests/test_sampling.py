"""Sampling against the distributions it claims, and streaming of characters that several tokens make."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from decdec.errors import UserError
from sampling import Sampler, Sampling, probabilities
from streaming import TextStream

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.5, -1.0, 2.5])


def draw(sampling, draws):
    sampler = Sampler("cpu")
    sampler.set(sampling, len(LOGITS))
    return torch.cat([sampler.next_token(LOGITS) for _ in range(draws)])


def frequencies(sampling, draws=20000):
    return torch.bincount(draw(sampling, draws), minlength=len(LOGITS)) / draws


def test_greedy_takes_the_largest():
    assert draw(Sampling(), 1).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    assert_close(frequencies(Sampling(temperature)), (LOGITS / temperature).softmax(0), atol=0.015, rtol=0)


def test_top_k_and_top_p_cut_the_tail():
    full = LOGITS.softmax(0)
    kept = probabilities(LOGITS, 1.0, 2, 1.0)
    assert kept.nonzero().flatten().tolist() == [1, 5]
    assert_close(kept[1] / kept[5], full[1] / full[5])
    # The likeliest three hold 0.89 of the mass, the likeliest two 0.73.
    assert probabilities(LOGITS, 1.0, 6, 0.8).nonzero().flatten().tolist() == [1, 2, 5]
    assert probabilities(LOGITS, 1.0, 6, 0.01).nonzero().flatten().tolist() == [1]
    assert_close(probabilities(LOGITS, 1.0, 99, 1.0), full)
    assert frequencies(Sampling(1.0, top_k=2), 200)[[0, 2, 3, 4]].sum() == 0
    assert draw(Sampling(1.0, top_p=0.4), 200).unique().tolist() == [1]


@pytest.mark.parametrize("least", [dict(temperature=1e-46), dict(temperature=1e-37), dict(temperature=1, top_p=1e-46)])
def test_what_float32_takes_for_nothing_is_greedy(least):
    assert draw(Sampling(**least), 20).unique().tolist() == [1]


def test_a_seed_repeats_and_another_differs():
    first, again, other = (draw(Sampling(1.0, seed=seed), 50).tolist() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("wrong", [dict(temperature=-1), dict(temperature=float("nan")), dict(top_k=-1), dict(top_p=0),
                                   dict(top_p=1.1), dict(temperature=1e300), dict(top_k=2**70), dict(seed=2**64)])
def test_bad_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes as tokens, so that every character beyond ASCII takes several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_streamed_text_is_whole_characters_and_equals_the_decoded_whole(tokenizer):
    text = "Grüße, 世界 👩‍🔬!\n ok  "
    ids = tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer, tokenizer("prompt ")["input_ids"])
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == text
    assert all("\ufffd" not in piece for piece in pieces) and len([piece for piece in pieces if piece]) == len(text)


def test_an_unfinished_character_is_given_out_at_the_end(tokenizer):
    ids = tokenizer("ok世")["input_ids"][:-1]
    stream = TextStream(tokenizer)
    assert "".join(stream.push(token) for token in ids) == "ok"
    assert stream.flush() == tokenizer.decode(ids)[2:] != ""
    assert stream.flush() == ""
