"""Channels taken down from one path and given to another: the same for both, and what they change."""

import pytest
import torch
from torch.testing import assert_close

from decdec import hub
from decdec.linear import Compensation
from decoder import Decoder
from same_text import logits_along, selected_by_decoder, selected_by_hugging_face
from selections import Tips, replayed

PROMPT, TOKENS = torch.tensor([5, 6, 7]), [8, 9, 10]


@pytest.mark.parametrize("selection", ["exact", "bucket"])
def test_both_paths_select_the_same_and_nothing_changes_when_it_is_given_back(folder, selection):
    setting = Compensation(16, selection)
    model, decoder = hub.load(folder, compensation=setting), Decoder(hub.load(folder))
    hub.set_compensation(decoder, setting)
    theirs, ours = selected_by_hugging_face(model, PROMPT, TOKENS), selected_by_decoder(decoder, PROMPT, TOKENS)
    assert set(ours) == set(theirs) and len(ours) == 4 * len(decoder.blocks)
    assert all(len(steps) == len(TOKENS) for steps in ours.values())
    assert all(torch.equal(mine, other) for key in ours for mine, other in zip(ours[key], theirs[key]))
    want = logits_along(decoder, PROMPT, TOKENS)
    with replayed(decoder, ours) as tips:
        assert_close(logits_along(decoder, PROMPT, TOKENS), want, rtol=1e-4, atol=1e-4)
    assert (tips.count, tips.of, tips.widest) == (0, len(TOKENS) * len(ours), 0)
    assert torch.equal(logits_along(decoder, PROMPT, TOKENS), want)  # the layers are as they were


def test_given_channels_are_those_that_count(folder):
    decoder = Decoder(hub.load(folder))
    hub.set_compensation(decoder, Compensation(16, "exact"))
    selections = selected_by_decoder(decoder, PROMPT, TOKENS)
    none = {key: [torch.full_like(step, -1) for step in steps] for key, steps in selections.items()}
    with replayed(decoder, none):
        got = logits_along(decoder, PROMPT, TOKENS)
    hub.set_compensation(decoder, Compensation())
    assert_close(got, logits_along(decoder, PROMPT, TOKENS), rtol=1e-4, atol=1e-4)


def test_how_far_exchanged_channels_lie_apart():
    tips, magnitude = Tips(), torch.cat((torch.tensor([4.0, 2.0, 1.9, 1.0]), torch.zeros(1020), torch.tensor([8.0, 7.0])))
    tips.add(magnitude, torch.tensor([0, 1, 1024]), torch.tensor([0, 1, 1024]))
    assert (tips.count, tips.of, tips.widest) == (0, 1, 0)
    tips.add(magnitude, torch.tensor([0, 1, 1024]), torch.tensor([0, 2, 1024]))
    assert (tips.count, tips.of) == (1, 2) and tips.widest == pytest.approx(0.05)
    tips.add(magnitude, torch.tensor([0, 1, 1024]), torch.tensor([0, 2, 1025]))
    assert tips.widest == pytest.approx(0.125)  # in the second chunk
    tips.add(magnitude, torch.tensor([0, 1, 1024]), torch.tensor([0, -1, 1024]))
    assert (tips.count, tips.of, tips.widest) == (3, 4, 1)
