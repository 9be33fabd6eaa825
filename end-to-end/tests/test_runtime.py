"""What a runtime takes from its model: the tokens that end a text, and a model it does not serve."""

import json
import shutil

import pytest
import transformers

from decdec.errors import UserError
from runtime import Runtime


def test_texts_end_at_every_token_that_the_generation_config_names(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "m")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert Runtime(other, device="cpu").stop == Runtime(folder, device="cpu").stop | {7, 9}


def test_a_model_of_another_shape_is_refused_in_one_line(tmp_path):
    config = transformers.MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=64, max_seq_len=32)
    transformers.MptForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no layers of Llama's shape"):
        Runtime(tmp_path, device="cpu")
