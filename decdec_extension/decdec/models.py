"""Loading original models, and finding their decoder's linear layers from the module tree (no model names)."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from decdec.errors import UserError
from decdec.files import safetensors_names, safetensors_spans

KINDS = ("qkv", "o", "gu", "d")  # the paper's: attention's inputs and output, the MLP's inputs and output
OTHER = "other"  # a layer whose name tells none of them; it is quantized and compensated like the rest
_NAMES = {"qkv": "q_proj k_proj v_proj qkv_proj query_key_value query key value Wqkv wqkv c_attn",
          "o": "o_proj out_proj dense wo attn.c_proj attention.c_proj self_attn.c_proj",
          "gu": "gate_proj up_proj gate_up_proj fc1 fc_in c_fc dense_h_to_4h w1 w3",
          "d": "down_proj fc2 fc_out c_proj dense_4h_to_h w2"}
_BIN = "pytorch_model*.bin"  # the weights of a model that has no safetensors; other .bin files are a trainer's
_KIND_OF = {name: kind for kind, names in _NAMES.items() for name in names.split()}


def load_model(source: str, dtype: torch.dtype | str = "auto"):
    """An original Hugging Face causal LM, in eval mode on the CPU, from a folder or a hub id that holds all of its weights."""
    from transformers import AutoModelForCausalLM

    check_source(source)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (OSError, SafetensorError, ValueError, ImportError) as error:
        raise UserError(f"model: {source!r} could not be loaded: {_first_line(error)}") from None
    if found["missing_keys"]:  # transformers makes them up
        raise UserError(f"model: expected an original model, {source!r} has no {min(found['missing_keys'])}")
    return model.eval()


def local_folder(source: str) -> Path:
    """The folder of a model given as a folder or a hub id (downloaded once by the hub's own cache)."""
    check_source(source)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
    others = ["consolidated*", "*/*"]  # the weights once more, in other forms
    try:
        folder = Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=others))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(source, allow_patterns=[*wanted, _BIN], ignore_patterns=others))
        return folder
    except Exception as error:  # the hub client raises many kinds; whichever, the user can only name another model
        raise UserError(f"model: expected a model folder or a hub id that can be reached, got {source!r} "
                        f"({type(error).__name__})") from None


def original_hash(folder: Path) -> str:
    """Short hash of an original's weights, the same wherever the folder lies and over however many files they are spread.

    Of every tensor its name, type, shape and 64 bytes at each of 4 places are read: enough to tell models apart, not to find one
    changed number. Of files that are no safetensors, 64 bytes at each of 256 places.
    """
    digest = hashlib.sha256()

    def sample(path: Path, start: int, size: int, places: int) -> None:
        with open(path, "rb") as file:
            for place in range(places):
                at = place * size // places
                file.seek(start + at)
                digest.update(file.read(min(64, size - at)))

    if names := safetensors_names(folder) or sorted(path.name for path in folder.glob("*.safetensors")):
        for name, span in sorted(safetensors_spans(folder, names).items()):
            digest.update(json.dumps([name, span.dtype, span.shape]).encode())
            sample(span.path, span.start, span.size, 4)
    elif paths := sorted(folder.glob(_BIN)):
        for path in paths:
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            sample(path, 0, size, 256)
    else:
        raise UserError(f"model: expected safetensors files or {_BIN}, {str(folder)!r} has none")
    return digest.hexdigest()[:16]


def original_of(folder: str | Path, base_model: str) -> str:
    """The source of a quantized folder's original: its ``base_model`` is a hub id, or a path relative to the folder."""
    beside = Path(folder) / base_model
    return str(beside) if beside.is_dir() else base_model


def load_tokenizer(source: str):
    from transformers import AutoTokenizer

    check_source(source)
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # of many kinds for broken and foreign files
        raise UserError(f"model: no tokenizer in {source!r}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def check_source(source: str) -> None:
    """A path that exists must be a model folder; anything else may be a hub id."""
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"model: {source}: expected a model folder with a config.json")
    if path.is_file() or (not path.is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1)):
        raise UserError(f"model: expected a model folder or a hub id, got {source!r}")


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the longest ModuleList whose members all hold linear layers."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
             and all(any(isinstance(part, nn.Linear) for part in block.modules()) for block in module)]
    if not lists:
        raise UserError(f"model: {type(model).__name__} has no list of decoder blocks with linear layers")
    return max(lists, key=lambda item: len(item[1]))


def decoder_linears(model: nn.Module) -> Mapping[str, nn.Linear]:
    """Every linear layer of the decoder blocks by its full name, in order. Embeddings and the output head are not among them."""
    prefix, blocks = decoder_blocks(model)
    return {f"{prefix}.{name}": module for name, module in blocks.named_modules() if isinstance(module, nn.Linear)}


def compute_buffers(model: nn.Module) -> None:
    """Fill the buffers of a model on the meta device that no file holds (rotary frequencies, embedding scales), on the CPU.

    transformers computes them in the hook that initialises weights, so call this before the weights are loaded.
    """
    for module in model.modules():
        computed = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in computed:
            setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
        if computed:
            model._init_weights(module)


def layer_kind(name: str) -> str:
    """``qkv``, ``o``, ``gu``, ``d`` or ``other`` for a linear layer's name; the last one or two parts of it decide."""
    *_, parent, leaf = ("", *name.split("."))
    return _KIND_OF.get(f"{parent}.{leaf}") or _KIND_OF.get(leaf, OTHER)


def block_of(name: str) -> int | None:
    """Index of the decoder block that a layer is in: the first number in its name; None outside the blocks."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number.group(1)) if number else None


def context_length(source: str) -> int:
    """Longest sequence the model at ``source`` was made for, in tokens."""
    from transformers import AutoConfig

    check_source(source)
    try:
        config = AutoConfig.from_pretrained(source).get_text_config()
    except (OSError, ValueError) as error:
        raise UserError(f"model: {source!r} could not be loaded: {_first_line(error)}") from None
    for name in ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length"):
        if isinstance(length := getattr(config, name, None), int):
            return length
    raise UserError(f"model: {source!r} does not say how long its sequences may be; give --length where there is one")
