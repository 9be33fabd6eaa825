"""Every method on tiny random models of other architectures: biases, q/k norms, fused projections, norms of (1 + weight)."""

import gc
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from decdec import hub
from decdec.errors import UserError
from decdec.linear import Compensation
from decdec.models import load_model

from base_model import BaseModel, check_dense
from cheatsheet import make_cheatsheet
from mixed_precision import make_bit_map
from quantize import METHODS, quantize
from quantized_blocks import QuantizedBlocks
from scaling import read_scaling, scale_model

SHAPE = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
FAMILIES = {
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "phi3": (transformers.Phi3Config, {"num_key_value_heads": 4}),
    "gemma3": (transformers.Gemma3TextConfig, {"head_dim": 16, "num_key_value_heads": 4, "sliding_window": 32}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 16, "tie_word_embeddings": True}),
}
NORMS_OF_ONE_PLUS = {"gemma3"}


@pytest.fixture(scope="session")
def family(tiny, tmp_path_factory):
    """``family(name)``: folder of a random model whose norms and biases are not all alike, with the tiny model's tokenizer."""
    made = {}

    def make(name):
        if name not in made:
            config, changes = FAMILIES[name]
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config(**SHAPE | changes), dtype=torch.float16)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if parameter.dim() == 1:
                        shift = 0.4 if "norm" in key and name not in NORMS_OF_ONE_PLUS else -0.5
                        parameter.copy_(torch.rand(parameter.shape) * 1.5 + shift)
            made[name] = tmp_path_factory.mktemp("families") / name
            model.save_pretrained(made[name])
            for file in tiny.glob("tokenizer*"):
                shutil.copy(file, made[name])
        return made[name]

    return make


def tokens():
    return torch.randint(2, 258, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_folding_scales_leaves_the_logits_unchanged(family, calibration, tmp_path, name):
    folder = family(name)
    wanted = load_model(str(folder), torch.float32)(tokens()).logits
    quantize(str(folder), "awq", 3, str(tmp_path / "awq"), **calibration)
    scaling = read_scaling(tmp_path / "awq")
    model = scale_model(load_model(str(folder), torch.float32), scaling)
    torch.testing.assert_close(model(tokens()).logits, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    # Everything that reads a norm is scaled, and every norm that is scaled is stored so in the folder.
    leaves = {key.split(".", 3)[3] for key in scaling}
    assert {leaf for leaf in leaves if leaf.endswith("output_scale") and "norm" in leaf} == {
        "input_layernorm.output_scale",
        f"{'pre_feedforward' if name == 'gemma3' else 'post_attention'}_layernorm.output_scale"}
    assert any(leaf.startswith("mlp.down_proj") for leaf in leaves)
    assert ("input_layernorm.output_offset" in leaves) == (name in NORMS_OF_ONE_PLUS)
    stored = load_file(tmp_path / "awq" / "model.safetensors")
    for key, value in model.state_dict().items():
        if "norm" in key:
            torch.testing.assert_close(stored[key].float(), value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_full_residuals_restore_the_original(family, calibration, tmp_path, name, method):
    folder = family(name)
    quantize(str(folder), method, 3, str(tmp_path / "out"), **calibration)
    make_cheatsheet(tmp_path / "out", bits=16)
    model = hub.load(tmp_path / "out")
    with torch.no_grad():
        wanted = load_model(str(folder), torch.float32)(tokens()).logits
        distance = (model(tokens()).logits - wanted).norm() / wanted.norm()
        hub.set_compensation(model, Compensation(k_chunk=1024, selection="exact", prefill=True))
        restored = (model(tokens()).logits - wanted).norm() / wanted.norm()
    assert restored < 0.01 < distance < 1


@pytest.mark.parametrize("method", METHODS)
def test_tied_embeddings_are_left_alone(family, calibration, tmp_path, method):
    quantize(str(family("mistral")), method, 3, str(tmp_path / "out"), **calibration)
    stored, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", family("mistral")))
    assert torch.equal(stored["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    assert not any(name.startswith("lm_head") for name in stored)
    model = hub.load(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", FAMILIES)
def test_a_map_of_mixed_bits_is_made(family, calibration, tmp_path, name):
    for bits in (3, 4):
        quantize(str(family(name)), "rtn", bits, str(tmp_path / f"w{bits}"))
    bits = make_bit_map(str(family(name)), tmp_path / "w3", tmp_path / "w4", tmp_path / "map.json", **calibration)
    assert sorted(bits) == [3, 4]


def test_mixtures_of_experts_are_refused(tmp_path, calibration):
    config = transformers.Qwen3MoeConfig(**SHAPE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                                                    "head_dim": 16})
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / "moe")
    with pytest.raises(UserError, match="mixtures of experts are not supported"):
        quantize(str(tmp_path / "moe"), "rtn", 3, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_experts_in_a_list_are_refused(family):
    model = load_model(str(family("qwen2")))
    check_dense(model)
    model.model.layers[1].mlp.experts = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(2))
    with pytest.raises(UserError, match="model.layers.1.mlp.experts is a list of expert layers; mixtures of experts are not supported"):
        check_dense(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_read_block_by_block_is_the_one_loaded_whole(family, name):
    base, whole = BaseModel(family(name)), load_model(str(family(name)))
    assert all(parameter.is_meta for parameter in base.blocks.parameters())
    state = whole.state_dict()
    blocks = {f"{base.prefix}.{index}.{key}": value for index in range(2) for key, value in base.block(index).items()}
    assert blocks and all(torch.equal(value, state[key]) and value.dtype == state[key].dtype for key, value in blocks.items())
    for key, load in base.outside().items():
        assert torch.equal(load(), state[key])
    for (key, value), (_, expected) in zip(base.model.named_buffers(), whole.named_buffers()):
        torch.testing.assert_close(value.float(), expected.float(), rtol=1e-3, atol=1e-5, msg=key)


def test_files_do_not_stay_mapped(family, tmp_path):
    """Pages of a mapped file count as this process's memory, in the end the whole model's."""
    def mapped(folder):
        gc.collect()
        return Path("/proc/self/maps").read_text().count(str(folder / "model.safetensors"))

    source, out = family("qwen2"), tmp_path / "out"
    quantize(str(source), "rtn", 3, str(out))
    base, quantized = BaseModel(source), QuantizedBlocks(out)
    for folder, read in ((source, lambda: base.block(0)), (out, lambda: quantized.parts("model.layers.0.mlp.up_proj"))):
        before = mapped(folder)
        tensors = read()
        assert tensors and mapped(folder) > before
        del tensors
        assert mapped(folder) == before
