"""from_pretrained on a folder: the logits of the attached model, casting, saving and loading again."""

import shutil

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import decdec.quantizer  # noqa: F401  (registers the method)
from decdec import hub
from decdec.artifacts import CHEATSHEET, THRESHOLDS
from decdec.linear import Compensation
from decdec.testing import quick_folder

SIZES = dict(vocab_size=160, hidden_size=96, intermediate_size=1088, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, initializer_range=0.1)
IDS = torch.arange(24)[None] * 5 % 160


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits.float()


@pytest.fixture(scope="module", params=["codebook", "uniform"])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    if request.param == "codebook":
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **SIZES))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))  # with biases, untied
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return quick_folder(model, tmp_path_factory.mktemp("quantizer") / request.param, request.param)


def test_from_pretrained_equals_the_attached_model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for setting in (Compensation(), Compensation(8, prefill=True)):
        hub.set_compensation(model, setting)
        assert_close(logits(model), logits(hub.load(folder, compensation=setting)), rtol=1e-5, atol=1e-5)


def test_half_precision_keeps_the_packed_form(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, tensor in hub.load(folder).state_dict().items():
        if name.rpartition(".")[2] in ("qweight", "codebook", "scale", "scales", "zeros"):
            assert torch.equal(model.state_dict()[name], tensor) and model.state_dict()[name].dtype == tensor.dtype
    assert_close(logits(model), logits(hub.load(folder, torch.bfloat16)), rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_again(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    for name in (CHEATSHEET, THRESHOLDS):
        shutil.copy(folder / name, tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert_close(logits(again), logits(model), rtol=0, atol=0)
    setting = Compensation(8, prefill=True)
    hub.set_compensation(again, setting)
    assert_close(logits(again), logits(hub.load(tmp_path / "again", compensation=setting)), rtol=1e-5, atol=1e-5)
