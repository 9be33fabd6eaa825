"""Random models stand for real ones in measurements: their activations must be finite and of ordinary size."""

import pytest
import torch

from decdec import hub, sizes
from decdec.linear import Compensation, CompensatedLinear
from random_model import give_residuals, random_decoder


@pytest.mark.parametrize("form, bits", [("codebook", 2), ("codebook", 3), ("codebook", 4), ("uniform", 2),
                                        ("uniform", 3), ("uniform", 3.5), ("uniform", 4)])
def test_activations_stay_of_ordinary_size(form, bits, monkeypatch):
    monkeypatch.setitem(sizes.NAMED, "toy", (512, 1792, 4, 2, 16, 300))
    torch.manual_seed(0)
    decoder = random_decoder("toy", bits, form, torch.float32, torch.device("cpu"))
    give_residuals(decoder)
    seen, step = [], CompensatedLinear.step

    def watched(layer, x, stream=None, norm=None):
        out = step(layer, x, stream, norm)
        seen.extend((x.abs().max(), out.abs().max()))
        return out

    monkeypatch.setattr(CompensatedLinear, "step", watched)
    decoder.allocate(20)
    for k_chunk in (0, 256):
        hub.set_compensation(decoder, Compensation(k_chunk))
        logits = decoder.prefill(torch.arange(12) * 17 % 300)
        for position in range(12, 15):
            logits = decoder.step(logits.argmax().view(1), torch.tensor([position]))
        assert logits.isfinite().all() and 0.1 < logits.std() < 10
    assert len(seen) == 2 * 3 * 2 * 4 * 16 and torch.stack(seen).max() < 50  # NaN is not below
