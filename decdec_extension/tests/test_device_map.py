"""Models that accelerate spreads over a GPU and the CPU, or over two GPUs: the text of one GPU."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import decdec.quantizer  # noqa: F401  (registers the method)
from decdec import hub
from decdec.linear import Compensation
from decdec.testing import quick_folder

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

SIZES = dict(vocab_size=160, hidden_size=128, intermediate_size=1088, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, initializer_range=0.1)
IDS = torch.arange(24)[None] * 5 % 160
SETTINGS = (Compensation(), Compensation(16), Compensation(16, prefill=True))


@pytest.fixture(scope="module", params=["codebook", "uniform"])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    return quick_folder(model, tmp_path_factory.mktemp("device_map") / request.param, request.param)


def texts(model):
    """Greedy tokens for each of SETTINGS."""
    found = []
    for setting in SETTINGS:
        hub.set_compensation(model, setting)
        ids = IDS.to(model.device)
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                                    pad_token_id=0, eos_token_id=None)[0, IDS.shape[1]:].tolist())
    return found


@pytest.fixture(scope="module")
def want(folder):
    return texts(hub.load(folder, torch.float16, device="cuda"))


def spread(folder, places, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map=places, **options)


def by_blocks(first, second):
    """The first two blocks in one place, all that follows them in another."""
    return {"model.embed_tokens": first, "model.rotary_emb": first, "model.layers.0": first, "model.layers.1": first,
            "model.layers.2": second, "model.layers.3": second, "model.norm": second, "lm_head": second}


def test_settings_differ(want):
    assert len({tuple(tokens) for tokens in want}) > 1


def test_a_whole_model_on_one_gpu(folder, want, tmp_path):
    model = spread(folder, {"": 0})
    assert texts(model) == want
    model.save_pretrained(tmp_path)
    assert texts(spread(tmp_path, "auto")) == want


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_blocks_offloaded_to_the_cpu(folder, want, offload_buffers):
    model = spread(folder, by_blocks(0, "cpu") | {"model.norm": 0, "lm_head": 0}, offload_buffers=offload_buffers)
    assert model.model.layers[3].mlp.up_proj.qweight.is_meta == offload_buffers
    assert texts(model) == want


@two
def test_blocks_on_two_gpus(folder, want):
    model = spread(folder, by_blocks(0, 1))
    assert model.model.layers[3].mlp.up_proj.qweight.device == torch.device("cuda:1")
    assert texts(model) == want


@two
def test_one_process_a_gpu_loads_onto_its_own(folder, want):
    model = spread(folder, {"": 1})
    assert {tensor.device for tensor in model.state_dict().values()} == {torch.device("cuda:1")}
    assert texts(model) == want
