"""Any architecture whose linear layers are nn.Linear: attached, loaded through transformers, compensated by kind."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

import decdec.quantizer  # noqa: F401  (registers the method)
from decdec import hub, models
from decdec.linear import Compensation
from decdec.testing import quick_folder

WIDE = dict(vocab_size=160, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
            bos_token_id=0, eos_token_id=1)
OLD = dict(n_embd=64, n_layer=2, n_head=4, n_positions=128)
LATENT = dict(intermediate_size=128, moe_intermediate_size=32, n_routed_experts=4, num_key_value_heads=4, q_lora_rank=32,
              kv_lora_rank=32, first_k_dense_replace=2, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16)
# Model type, what differs from WIDE, the kinds of its linear layers.
FAMILIES = [("gpt_neox", dict(intermediate_size=128), "qkv o gu d"), ("opt", dict(ffn_dim=128), "qkv o gu d"),
            ("falcon", {}, "qkv o gu d"), ("starcoder2", dict(intermediate_size=128, num_key_value_heads=2), "qkv o gu d"),
            ("gptj", OLD | dict(rotary_dim=8), "qkv o gu d"), ("gpt_bigcode", OLD, "qkv o gu d"),
            ("mpt", dict(d_model=64, n_layers=2, n_heads=4), "qkv o gu d"), ("gemma2", dict(intermediate_size=128,
             num_key_value_heads=2, head_dim=16), "qkv o gu d"), ("phi", dict(intermediate_size=128), "qkv o gu d"),
            ("deepseek_v3", LATENT, "other o gu d")]
IDS = torch.arange(12)[None]


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("family, shape, kinds", FAMILIES, ids=[family[0] for family in FAMILIES])
def test_attached_loaded_and_compensated(tmp_path, family, shape, kinds):
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **WIDE | shape), dtype=torch.float32).eval()
    folder = quick_folder(original, tmp_path / family, "uniform", group_size=16, residual_bits=16)
    everything = Compensation(1024, "exact", prefill=True)

    model = hub.load(folder)
    base, want = logits(model), logits(original)
    assert {layer.kind for layer in hub.compensated_layers(model).values()} == set(kinds.split())
    hub.set_compensation(model, {kind: everything for kind in kinds.split()})  # each layer is reached by its kind
    restored = logits(model)
    assert (restored - want).norm() < 0.02 * (base - want).norm()

    for other in (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), hub.attach(original, folder)):
        assert_close(logits(other), base, rtol=1e-4, atol=1e-5)
        hub.set_compensation(other, everything)
        assert_close(logits(other), restored, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, kind", [
    ("model.layers.3.self_attn.q_proj", "qkv"), ("transformer.h.0.attn.c_proj", "o"), ("transformer.h.0.mlp.c_proj", "d"),
    ("model.layers.3.mlp.w2", "d"), ("model.layers.3.mixer.in_proj", "other"), ("head", "other"),
])
def test_kinds_by_name(name, kind):
    assert models.layer_kind(name) == kind
