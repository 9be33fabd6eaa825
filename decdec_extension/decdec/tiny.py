"""A random two-layer Llama with a byte-level tokenizer: every stage runs on it in seconds, on a CPU, without a network."""

import argparse
from pathlib import Path

import torch

from decdec.errors import run


def make_model(folder: str | Path, seed: int = 0) -> Path:
    """Write the tiny model as a Hugging Face folder and return its path. The widths are ragged on purpose."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = save_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=192, intermediate_size=1088, num_hidden_layers=2,
                         num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512,
                         tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    return Path(folder)


def save_tokenizer(folder: str | Path) -> int:
    """Write the byte-level tokenizer and return the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    wrapped.save_pretrained(folder)
    return len(vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="where the model folder is written")
    print(f"wrote {make_model(parser.parse_args().folder)}")


if __name__ == "__main__":
    run(main)
