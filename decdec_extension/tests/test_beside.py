"""Layers that another library runs, here a stand-in for one: compensated beside their own forward."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from decdec import hub
from decdec.beside import Beside
from decdec.errors import UserError
from decdec.linear import Compensation
from decdec.models import decoder_linears
from decdec.testing import quick_folder

SIZES = dict(vocab_size=160, hidden_size=128, intermediate_size=1088, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, initializer_range=0.1,
             attention_bias=True)
IDS = torch.arange(24)[None] * 5 % 160
PROMPT = 12
SETTINGS = [Compensation(), Compensation(8, "exact"), Compensation(16), Compensation(16, "static"),
            Compensation(16, prefill=True)]
DEVICES = [("cpu", torch.float32), pytest.param("cuda", torch.float16, marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))]


class Theirs(nn.Module):
    """A quantized layer as libraries make them: no ``weight``, not an ``nn.Linear``."""

    def __init__(self, weight, bias):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("packed", weight)
        self.bias = bias

    def forward(self, x):
        return F.linear(x, self.packed, self.bias)


def original(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.fixture(scope="module", params=["codebook", "uniform"])
def folder(request, tmp_path_factory):
    return quick_folder(original(), tmp_path_factory.mktemp("beside") / "m", request.param)


def of_their_library(folder, device="cpu", dtype=torch.float32):
    """The folder's weights in the other library's layers."""
    model, ours = original().to(device, dtype), hub.load(folder, dtype, device=device)
    for name, linear in decoder_linears(model).items():
        hub.replace(model, name, Theirs(ours.get_submodule(name).dequantize(dtype), linear.bias))
    return model


@torch.no_grad()
def logits(model, ids):
    """Of a prompt, then token after token; float32 ``(24, 160)`` on the CPU."""
    ids = ids.to(model.device)
    out = model(ids[:, :PROMPT], use_cache=True)
    rows = [out.logits[0]]
    for token in ids[0, PROMPT:]:
        out = model(token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0])
    return torch.cat(rows).float().cpu()


@pytest.mark.parametrize("device, dtype", DEVICES)
def test_their_layers_give_what_ours_give(folder, device, dtype):
    theirs, ours = of_their_library(folder, device, dtype), hub.load(folder, dtype, device=device)
    names, plain = list(theirs.state_dict()), logits(theirs, IDS)
    assert hub.attach(theirs, folder) is theirs
    assert len(hub.compensated_layers(theirs)) == 14 and list(theirs.state_dict()) == names
    assert_close(logits(theirs, IDS), plain, rtol=0, atol=0)
    for setting in SETTINGS:
        for model in (theirs, ours):
            hub.set_compensation(model, setting)
        found, want = logits(theirs, IDS), logits(ours, IDS)
        if device == "cpu":
            assert_close(found, want, rtol=1e-4, atol=1e-4)
        else:  # the median, since rounding tips a selection now and then
            apart = (found - want).abs().mean(1) / want.std()
            assert max(apart[:PROMPT].median(), apart[PROMPT:].median()) < 0.01, setting
        changed = (found - plain).abs().mean(1) / plain.std() > 0.02
        assert changed[PROMPT:].all() == bool(setting.k_chunk) and changed[0] == setting.prefill
    assert hub.memory(theirs)["host_bytes"] == hub.memory(ours)["host_bytes"] > 0


def test_a_copy_goes_its_own_way_and_what_is_not_quantized_comes_from_the_folder(folder):
    model = of_their_library(folder)
    model.model.norm.weight.data.fill_(7)  # scales that were folded into norms come with the folder
    hub.attach(model, folder, Compensation(8, "exact"))
    assert_close(logits(model, IDS), logits(hub.load(folder, compensation=Compensation(8, "exact")), IDS), rtol=1e-4,
                 atol=1e-4)
    other = copy.deepcopy(model)
    hub.set_compensation(other, Compensation())
    assert (logits(other, IDS) - logits(model, IDS)).abs().max() > 1e-3
    assert not any(isinstance(module, Beside) for module in hub.attach(original(), folder).modules())


def test_weights_of_another_checkpoint_are_refused(folder):
    model = of_their_library(folder)
    layer = model.model.layers[1].mlp.up_proj
    layer.packed.copy_(layer.packed + 0.05 * layer.packed.std() * torch.randn_like(layer.packed))
    with pytest.raises(UserError, match="model.layers.1.mlp.up_proj: computes with other weights than the folder's"):
        hub.attach(model, folder)
    with pytest.raises(UserError, match="must have their weights"):
        hub.attach(of_their_library(folder).to("meta"), folder)
