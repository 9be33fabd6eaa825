"""The real model, where the quick start has made it: Hugging Face's logits and greedy text, for every k_chunk."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from decdec import hub, models
from decdec.linear import Compensation
from decoder import Decoder
from generation import generate
from stepper import Stepper

MODELS = Path(__file__).parents[2] / "models"
ORIGINAL = MODELS / "SmolLM2-135M-Instruct"
FOLDERS = [MODELS / f"SmolLM2-135M-Instruct-{method}-w3" for method in ("squeezellm", "awq")]
TEXT = "The three most important things about the Python language are its readability and the community around it."


def logits(model, decoder, ids, prompt):
    """Logits after the prompt and after each later token: Hugging Face's, and the decoder's."""
    decoder.allocate(len(ids))
    with torch.no_grad():
        out = model(ids[None, :prompt], use_cache=True)
        theirs, ours = [out.logits[0, -1]], [decoder.prefill(ids[:prompt])]
        for position in range(prompt, len(ids)):
            token = ids[position:position + 1]
            out = model(token[None], past_key_values=out.past_key_values, use_cache=True)
            theirs.append(out.logits[0, -1])
            ours.append(decoder.step(token, torch.tensor([position])))
    return torch.stack(theirs), torch.stack(ours)


@pytest.mark.parametrize("folder", [ORIGINAL, *FOLDERS], ids=lambda folder: folder.name)
def test_logits_and_text_equal_hugging_face(folder):
    needed = ["config.json"] if folder == ORIGINAL else ["config.json", "cheatsheet.pt", "thresholds.pt"]
    if not all((folder / name).is_file() for name in needed):
        pytest.skip(f"{folder.name} is not there; ./quickstart.sh makes it")
    load = (lambda: models.load_model(str(folder), torch.float32)) if folder == ORIGINAL else (lambda: hub.load(folder))
    model, decoder = load(), Decoder(load())
    ids = models.load_tokenizer(str(folder))(TEXT, return_tensors="pt").input_ids[0]
    after_first = []
    for k_chunk in (0,) if folder == ORIGINAL else (0, 8, 1024):
        for part in (model, decoder):
            hub.set_compensation(part, Compensation(k_chunk))
        theirs, ours = logits(model, decoder, ids, len(ids) - 4)
        assert_close(ours, theirs, rtol=1e-4, atol=2e-3)
        after_first.append(ours[1])
        want = model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=8, do_sample=False,
                              eos_token_id=None, pad_token_id=0)
        assert list(generate(Stepper(decoder), ids, 8)) == want[0, len(ids):].tolist()
    assert all((after_first[0] - other).abs().max() > 0.1 for other in after_first[1:])
