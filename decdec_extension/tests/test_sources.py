"""Folders of original models that cannot be used are refused in words, and how long their sequences may be."""

import json

import pytest

from decdec import models
from decdec.errors import UserError


@pytest.fixture
def source(tmp_path):
    """``source(**config)``: a folder with nothing but this config.json."""

    def make(**config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return make


@pytest.mark.parametrize("config", [{}, {"model_type": "foo"}, {"model_type": "t5"}, {"model_type": "llama"}])
def test_models_that_cannot_be_loaded(source, config):
    with pytest.raises(UserError, match="model: .* could not be loaded: ."):
        models.load_model(source(**config))


@pytest.mark.parametrize("content", [None, '{"a":', '{"a": 1}', "[]"])
def test_tokenizers_that_cannot_be_loaded(source, tmp_path, content):
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="model: no tokenizer in .*: ."):
        models.load_tokenizer(source(model_type="llama"))


@pytest.mark.parametrize("config, length", [
    ({"model_type": "llama", "max_position_embeddings": 77}, 77), ({"model_type": "mpt", "max_seq_len": 78}, 78),
    ({"model_type": "gpt2", "n_positions": 79}, 79), ({"model_type": "bloom", "seq_length": 80}, 80),
    ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "max_position_embeddings": 81}}, 81)])
def test_context_length(source, config, length):
    assert models.context_length(source(**config)) == length


@pytest.mark.parametrize("config, match", [({"model_type": "bloom"}, "give --length"), ({}, "model_type"),
                                           ({"model_type": "foo"}, "foo")])
def test_no_context_length(source, config, match):
    with pytest.raises(UserError, match=match):
        models.context_length(source(**config))
