"""The real model, where the quick start has made it: Hugging Face's logits and greedy text, for every k_chunk."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from decdec import hub, models
from decdec.linear import Compensation
from decdec.testing import logits_of_decoder, logits_of_hugging_face
from decoder import Decoder
from generation import generate
from stepper import Stepper

MODELS = Path(__file__).parents[2] / "models"
ORIGINAL = MODELS / "SmolLM2-135M-Instruct"
FOLDERS = [MODELS / f"SmolLM2-135M-Instruct-{method}-w3" for method in ("squeezellm", "awq")]
TEXT = "The three most important things about the Python language are its readability and the community around it."


def need(folder):
    needed = ["config.json"] if folder == ORIGINAL else ["config.json", "cheatsheet.pt", "thresholds.pt"]
    if not all((folder / name).is_file() for name in needed):
        pytest.skip(f"{folder.name} is not there; ./quickstart.sh makes it")


@pytest.mark.parametrize("folder", [ORIGINAL, *FOLDERS], ids=lambda folder: folder.name)
def test_logits_and_text_equal_hugging_face(folder):
    need(folder)
    load = (lambda: models.load_model(str(folder), torch.float32)) if folder == ORIGINAL else (lambda: hub.load(folder))
    model, decoder = load(), Decoder(load())
    ids = models.load_tokenizer(str(folder))(TEXT, return_tensors="pt").input_ids[0]
    prompt = len(ids) - 4
    after_first = []
    for k_chunk in (0,) if folder == ORIGINAL else (0, 8, 1024):
        for part in (model, decoder):
            hub.set_compensation(part, Compensation(k_chunk))
        theirs, ours = logits_of_hugging_face(model, ids, prompt), logits_of_decoder(decoder, ids, prompt)
        assert_close(ours, theirs, rtol=1e-4, atol=2e-3)
        after_first.append(ours[1])
        want = model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=8, do_sample=False,
                              eos_token_id=None, pad_token_id=0)
        assert list(generate(Stepper(decoder), ids, 8)) == want[0, len(ids):].tolist()
    assert all((after_first[0] - other).abs().max() > 0.1 for other in after_first[1:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_logits_on_a_gpu_are_as_near_to_exact_ones_as_hugging_face(folder):
    need(folder)
    exact, model = hub.load(folder), hub.load(folder, torch.float16, device="cuda")
    decoder = Decoder(hub.load(folder, torch.float16)).cuda()
    ids = models.load_tokenizer(str(folder))(TEXT, return_tensors="pt").input_ids[0]
    prompt = len(ids) - 4
    base = logits_of_hugging_face(exact, ids, prompt)
    for setting in (Compensation(), Compensation(8), Compensation(16, "exact"), Compensation(1024, "exact")):
        for part in (exact, model, decoder):
            hub.set_compensation(part, setting)
        want = logits_of_hugging_face(exact, ids, prompt)
        theirs, ours = logits_of_hugging_face(model, ids, prompt), logits_of_decoder(decoder, ids, prompt)
        if 0 < setting.k_chunk < 1024:  # in 120 layers rounding tips some selection of every token, for either
            assert (ours - want).norm() < max(2 * (theirs - want).norm(), 0.6 * (base - want).norm()), setting
        else:
            assert (ours - want).norm() <= 2 * (theirs - want).norm(), setting
