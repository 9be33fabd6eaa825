"""What a runtime takes from its model: the tokens that end a text, and a model it does not serve."""

import json
import shutil

import pytest
import torch
import transformers

from benchmark import read_bytes
from decdec import hub
from decdec.errors import UserError
from decdec.linear import Compensation
from decdec.reference import chunk_counts
from runtime import Runtime, device_and_dtype


def test_texts_end_at_every_token_that_the_generation_config_names(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "m")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert Runtime(other, device="cpu").stop == Runtime(folder, device="cpu").stop | {7, 9}


def test_a_model_of_another_shape_is_refused_in_one_line(tmp_path):
    config = transformers.MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=64, max_seq_len=32)
    transformers.MptForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no layers of Llama's shape"):
        Runtime(tmp_path, device="cpu")


def test_the_device_that_is_named_becomes_the_current_one(monkeypatch):
    current = []
    for name, value in (("is_available", True), ("device_count", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.ops.decdec, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    device_and_dtype("cuda")
    assert device_and_dtype("cuda:1") == (torch.device("cuda:1"), torch.float16) and current == [torch.device("cuda:1")]


def test_of_residuals_on_the_gpu_a_token_reads_the_chosen_rows(folder):
    decoder = Runtime(folder, Compensation(8), "cpu").decoder
    before, fetched = read_bytes(decoder), 0
    for layer in hub.compensated_layers(decoder).values():
        fetched += sum(chunk_counts(layer.in_features, 8)) * layer.residual[0].nbytes
        layer.residual_in = "gpu"  # as place_residuals says where there is one
    assert read_bytes(decoder) == before + fetched
