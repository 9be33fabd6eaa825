"""A decoder of a known model's shapes with random weights, made where it runs: speed needs no checkpoint."""

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from decdec import hub, packing
from decdec.artifacts import QuantConfig
from decdec.errors import UserError
from decdec.linear import CompensatedLinear
from decdec.models import block_of, compute_buffers, decoder_linears
from decdec.placement import place_residuals
from decdec.sizes import HEAD_DIM, NAMED, bits_of_blocks
from decoder import Decoder

GROUP_SIZE = 128  # of uniform weights
CONTEXT = 8192
ZEROS = 0x88  # a byte of two residual codes that stand for 0


def random_decoder(name: str, bits: float, form: str, dtype: torch.dtype, device: torch.device,
                   head_bits: int = 16) -> Decoder:
    """A Llama with sizes of :data:`decdec.sizes.NAMED`, its linear layers of the form ``codebook`` or ``uniform``."""
    if name not in NAMED:
        raise UserError(f"random-weights: expected one of {', '.join(NAMED)}, got {name!r}")
    hidden, mlp, heads, kv_heads, blocks, vocabulary = NAMED[name]
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=blocks,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=HEAD_DIM,
                         max_position_embeddings=CONTEXT)
    return Decoder(random_model(config, bits, form, dtype, device), head_bits).eval()


def random_model(config: LlamaConfig, bits: float, form: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A Hugging Face causal LM of ``config`` on ``device`` with random packed layers and random other weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    block_bits = bits_of_blocks(bits, config.num_hidden_layers)
    for name, linear in decoder_linears(model).items():
        of_block = block_bits[block_of(name)]
        quant = QuantConfig("random", form, of_block, GROUP_SIZE if form == "uniform" else None, "", "")
        empty = hub.empty_packed(name, linear.out_features, linear.in_features, quant)
        packed = {key: _random_packed(key, tensor, of_block, device) for key, tensor in empty.items()}
        hub.replace(model, name, CompensatedLinear(name, linear.in_features, packed))
    compute_buffers(model)
    for name, parameter in list(model.named_parameters()):
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        values.fill_(1.0) if "norm" in name else values.normal_(std=0.02)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(values, requires_grad=False))
    return model.to(device)


def _random_packed(key: str, empty: Tensor, bits: int, device: torch.device) -> Tensor:
    """One of a layer's packed tensors, its weights about 0.02 wide and 0 in the mean.

    A mean that all weights share would grow from block to block until activations overflow, and those take a slow path.
    """
    made = torch.empty(empty.shape, dtype=empty.dtype, device=device)
    if key == "qweight":
        return made.random_(-2**31, 2**31 - 1)
    if key == "codebook":
        return made.random_(-2**15 + 1, 2**15 - 1)
    return made.fill_({"scale": 0.02 / 2**14, "scales": 0.02 / 2 ** (bits - 2), "zeros": (2**bits - 1) / 2}[key])


def give_residuals(decoder: Decoder, where: str = "host") -> None:
    """Give every layer thresholds and a 4-bit residual of zeros: values do not matter for speed while they are finite."""
    layers = list(hub.compensated_layers(decoder).values())
    shapes = [(layer.in_features, packing.residual_row_bytes(layer.out_features, 4)) for layer in layers]
    device = layers[0].qweight.device
    if device.type == "cuda" and where == "host":
        from decdec import arena  # it needs the CUDA ops

        # Some machines' memory grows as it is used, so what is free now says little.
        rows = arena.pinned_rows(shapes, device, check_memory=False)
    else:
        rows = [torch.empty(shape, dtype=torch.uint8, device=device) for shape in shapes]
    for residual in rows:
        residual.fill_(ZEROS)
    for layer, residual in zip(layers, rows):
        scale = torch.full((1, layer.out_features), 1e-3, dtype=torch.float16, device=device)
        layer.set_residual(residual, scale, 4, nested=False)
        layer.set_thresholds(torch.linspace(4, 0.01, layer.in_features), torch.ones(layer.in_features))
        layer.residual_in = where
    place_residuals(layers, where)
