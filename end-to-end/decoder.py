"""A decoder with a static key-value cache, built from the modules of any Hugging Face model of Llama's shape.

What it supports is read from the model's own modules and config, never from its name: RMSNorm, rotary positions with
any fixed scaling and longrope, grouped-query attention, optional q/k norm, projection biases and sliding windows, gated
MLP, tied embeddings. q/k/v and gate/up are fused. The prompt goes through in chunks (:meth:`Decoder.prefill`); a step
takes its token and position from the device and holds no data-dependent Python, so it can be captured as a graph.
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from decdec import decode_ops
from decdec.errors import UserError
from decdec.linear import CompensatedLinear, fuse
from head import Head

PREFILL_CHUNK = 512  # prompt tokens at a time: enough to pay for dequantizing, small enough to bound the activations

_BLOCK = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "resid_attn_dropout", "resid_mlp_dropout"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}
# Factors and caps that change the function, with the value that leaves it alone.
_NEUTRAL = {"embedding_multiplier": 1, "residual_multiplier": 1, "logits_scaling": 1, "logit_scale": 1,
            "final_logit_softcapping": None, "attn_logit_softcapping": None}


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension, the mean in float32."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight = getattr(norm, "weight", None)
        if self.weight is None:
            raise UserError(f"model: its {type(norm).__name__} has no weight; use decdec.hub for it")
        self.eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 1e-6)
        probe = torch.linspace(-1, 1, len(self.weight), dtype=self.weight.dtype, device=self.weight.device)
        if not torch.allclose(self(probe), norm(probe), rtol=1e-2, atol=1e-3):
            raise UserError(f"model: its {type(norm).__name__} is not x / rms(x) * weight; use decdec.hub for it")

    def forward(self, x: Tensor) -> Tensor:
        return decode_ops.rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)


class Rotary(nn.Module):
    """Rotary positions of a model: ``frequencies`` float32 ``(1 or 2, rotary / 2)``, radians a position.

    The first row is the model's own, so that every fixed scaling (linear, llama3, yarn, ...) comes with it. Longrope's
    second row serves sequences that reach the position ``long_from``.
    """

    def __init__(self, config, rotary: nn.Module):
        super().__init__()
        rows, self.scaling, self.long_from = [rotary.inv_freq.float()], rotary.attention_scaling, 0
        if getattr(rotary, "rope_type", "") == "longrope":
            self.long_from = config.rope_parameters["original_max_position_embeddings"]
            rows = [ROPE_INIT_FUNCTIONS["longrope"](config, rotary.inv_freq.device, seq_len=length)[0].float()
                    for length in (self.long_from, self.long_from + 1)]
        self.register_buffer("frequencies", torch.stack(rows), persistent=False)

    def _apply(self, fn, recurse=True):
        exact = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = exact.to(self.frequencies.device)  # .half() and the like would lose positions
        return self

    def at(self, positions: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """For :func:`_rotate`: cosines of ``positions`` ``(T,)`` in a sequence of ``length`` tokens, and sines, those of the first
        half negative, each ``(T, 1, rotary)``."""
        row = self.frequencies[-1 if self.long_from and length > self.long_from else 0]
        angles = (positions[:, None].float() * row)[:, None]
        cos, sin = angles.cos() * self.scaling, angles.sin() * self.scaling
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


class Block(nn.Module):
    """One decoder block: norm, attention, norm, gated MLP."""

    def __init__(self, source: nn.Module, name: str, heads: int, kv_heads: int, head_dim: int, window: int | None):
        super().__init__()
        attention, mlp = source.self_attn, source.mlp
        self.heads, self.kv_heads, self.head_dim, self.window = heads, kv_heads, head_dim, window
        self.scaling = getattr(attention, "scaling", head_dim**-0.5)
        self.input_norm, self.mlp_norm = RMSNorm(source.input_layernorm), RMSNorm(source.post_attention_layernorm)
        self.q_norm = RMSNorm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.k_norm = RMSNorm(attention.k_norm) if hasattr(attention, "k_norm") else None
        self.qkv = _fused(attention, ("q_proj", "k_proj", "v_proj"), f"{name}.self_attn.qkv_proj")
        self.o = attention.o_proj
        self.gu = _fused(mlp, ("gate_proj", "up_proj"), f"{name}.mlp.gate_up_proj")
        self.d = mlp.down_proj
        self.activation = getattr(mlp, "act_fn", None) or mlp.activation_fn
        probe = torch.linspace(-4, 4, 33)
        self.silu = torch.equal(self.activation(probe), F.silu(probe))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], positions: Tensor, mask: Tensor | None, keys: Tensor,
                values: Tensor) -> Tensor:
        """Several tokens ``x`` ``(T, hidden)``; ``keys`` and ``values`` ``(kv_heads, length, head_dim)`` are written at
        ``positions`` ``(T,)``.

        ``mask`` is bool ``(T, live)``: the first ``live`` places of the cache are attended where it is true. Without one
        the tokens are a sequence's first, and each attends to all up to itself.
        """
        heads, kv_heads, live = self.heads, self.kv_heads, len(x) if mask is None else mask.shape[1]
        qk, v = self.qkv(self.input_norm(x)).view(len(x), -1, self.head_dim).split((heads + kv_heads, kv_heads), dim=1)
        if self.q_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :heads]), self.k_norm(qk[:, heads:])), dim=1)
        q, k = _rotate(qk, *rotary).transpose(0, 1).split((heads, kv_heads))
        keys.index_copy_(1, positions, k)
        values.index_copy_(1, positions, v.transpose(0, 1))
        attended = F.scaled_dot_product_attention(q[None], keys[None, :, :live],
                                                  values[None, :, :live], attn_mask=mask, is_causal=mask is None,
                                                  scale=self.scaling, enable_gqa=heads != kv_heads)
        x = x + self.o(attended[0].transpose(0, 1).reshape(len(x), heads * self.head_dim))
        return x + self.d(self._gated(self.gu(self.mlp_norm(x))))

    def step(self, x: Tensor, position: Tensor, rotary: Rotary, keys: Tensor, values: Tensor, live_at_most: int,
             workspace: Tensor) -> Tensor:
        """One token ``x`` ``(1, hidden)`` at ``position`` int64 ``(1,)``; the rest as :func:`decdec.decode_ops.attend`
        takes it."""
        norms = (None, None, 1e-6) if self.q_norm is None else (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        qkv = _step(self.qkv, x, norm=self.input_norm)
        attended = decode_ops.attend(qkv, position, keys, values, rotary.frequencies, rotary.scaling, rotary.long_from,
                                     self.scaling, self.window or 0, *norms, live_at_most, workspace)
        x = _step(self.o, attended, x)
        return _step(self.d, self._gated(_step(self.gu, x, norm=self.mlp_norm)), x)

    def _gated(self, gate_up: Tensor) -> Tensor:
        if self.silu:
            return decode_ops.silu_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate) * up


class Decoder(nn.Module):
    """The decoder of one sequence. Takes its modules from ``model``, which is not to be used afterwards.

    ``hub.set_compensation`` and ``hub.memory`` work on it as on the model. Call :meth:`allocate` before the first
    token, and after a move to another device. ``head_bits`` 8 rounds the output head to 8 bits.
    """

    def __init__(self, model: nn.Module, head_bits: int = 16):
        super().__init__()
        config = model.config
        body = model.base_model
        blocks = getattr(body, "layers", nn.ModuleList())
        _check(config, body, blocks)
        self.context = config.max_position_embeddings
        self.embed, self.head = model.get_input_embeddings(), Head(model.get_output_embeddings(), head_bits)
        self.norm = RMSNorm(body.norm)
        self.rotary = Rotary(config, body.rotary_emb)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.cache_shape = (len(blocks), kv_heads, head_dim)
        self.blocks = nn.ModuleList()
        for i, window in enumerate(_windows(config, len(blocks))):
            name = f"{model.base_model_prefix}.layers.{i}"
            self.blocks.append(Block(blocks[i], name, heads, kv_heads, head_dim, window))
            blocks[i] = nn.Identity()  # frees the parts that were fused
        self.keys = self.values = self.workspace = None
        if hasattr(model, "decdec"):
            self.decdec = model.decdec

    @property
    def places(self) -> int:
        """Tokens that there is room for."""
        return 0 if self.keys is None else self.keys.shape[2]

    def allocate(self, length: int) -> None:
        """Make room for ``length`` tokens: caches ``(blocks, kv_heads, length, head_dim)`` in the embedding's dtype."""
        blocks, kv_heads, head_dim = self.cache_shape
        self.keys = self.values = None  # freed before as much is asked for again
        weight = self.embed.weight
        try:
            self.keys = weight.new_zeros((blocks, kv_heads, length, head_dim))
            self.values = torch.zeros_like(self.keys)
        except torch.OutOfMemoryError:
            size = 2 * blocks * kv_heads * length * head_dim * weight.element_size()
            raise UserError(f"context: the cache of {length} tokens takes {size / 1e9:.2f} GB, which the memory of "
                            f"{weight.device} has not; ask for a shorter one") from None
        self.workspace = torch.zeros(4 * self.blocks[0].heads, dtype=torch.uint8, device=weight.device)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Logits float32 ``(vocab,)`` after the prompt ``tokens`` int64 ``(T,)``, which starts an empty sequence."""
        length, end = len(tokens), 0
        # Even chunks, so that no chunk is a single token, which would count as a decode step.
        for part in tokens.tensor_split(-(-length // PREFILL_CHUNK)):
            start, end = end, end + len(part)
            hidden = self._several(part, torch.arange(start, end, device=part.device), end, length)
        return self.head(hidden[-1:])

    def _several(self, tokens: Tensor, positions: Tensor, live: int, length: int) -> Tensor:
        """Hidden states ``(T, hidden)`` of ``tokens`` ``(T,)`` at ``positions`` ``(T,)`` of a prompt of ``length``.

        The first ``live`` places are attended to, those beyond a token masked.
        """
        x = self.embed(tokens)
        rotary = self.rotary.at(positions, length, x.dtype)
        masks = {window: _mask(positions, live, window) for window in {block.window for block in self.blocks}}
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, positions, masks[block.window], self.keys[i], self.values[i])
        return self.norm(x)

    @torch.inference_mode()
    def step(self, token: Tensor, position: Tensor, live_at_most: int = 0) -> Tensor:
        """Logits float32 ``(vocab,)`` after one more ``token`` int64 ``(1,)`` at ``position`` int64 ``(1,)``.

        ``live_at_most``: a bound of the tokens read, this one included, if one is known (0: none).
        """
        x = self.embed(token)
        for block, keys, values in zip(self.blocks, self.keys, self.values):
            x = block.step(x, position, self.rotary, keys, values, live_at_most, self.workspace)
        return self.head(self.norm(x))


def _mask(positions: Tensor, live: int, window: int | None) -> Tensor | None:
    """Which of the first ``live`` places the tokens at ``positions`` ``(T,)`` attend to, bool ``(T, live)``; None, which spares
    every block some small kernels, where it is all up to themselves and they are the first."""
    if len(positions) == live and (window is None or window >= live):
        return None
    place = torch.arange(live, device=positions.device)
    mask = place <= positions[:, None]
    return mask if window is None else mask & (place > positions[:, None] - window)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first ``cos.shape[-1]`` of the last dimension of ``x`` ``(T, heads, head_dim)``; sines as
    :meth:`Rotary.at` gives them."""
    turned, rest = x[..., :cos.shape[-1]], x[..., cos.shape[-1]:]
    first, second = turned.chunk(2, dim=-1)
    turned = torch.addcmul(turned * cos, torch.cat((second, first), dim=-1), sin)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _step(layer: nn.Module, x: Tensor, stream: Tensor | None = None, norm: RMSNorm | None = None) -> Tensor:
    """``stream + layer(norm(x))`` of one token, as :meth:`decdec.linear.CompensatedLinear.step` for any layer."""
    if isinstance(layer, CompensatedLinear):
        return layer.step(x, stream, None if norm is None else (norm.weight, norm.eps))
    out = layer(x if norm is None else norm(x))
    return out if stream is None else stream + out


def _fused(parent: nn.Module, names: tuple[str, ...], name: str) -> nn.Module:
    """The layers ``names`` of ``parent`` as one, or the one the model itself has fused (called as ``name`` ends)."""
    own = name.rpartition(".")[2]
    if hasattr(parent, own):
        return getattr(parent, own)
    layers = [getattr(parent, part) for part in names]
    if all(isinstance(layer, CompensatedLinear) for layer in layers):
        return fuse(layers, name)
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        raise UserError(f"{name}: cannot fuse quantized with unquantized layers")
    first = layers[0].weight
    fused = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers),
                      bias=layers[0].bias is not None, device="meta", dtype=first.dtype)
    fused.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
    if layers[0].bias is not None:
        fused.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]), requires_grad=False)
    return fused


def _windows(config, blocks: int) -> list[int | None]:
    """The sliding window of every block, None where it sees everything."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * blocks
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _check(config, body: nn.Module, blocks: nn.ModuleList) -> None:
    """Refuse a model that computes something this decoder does not."""
    if not len(blocks):
        raise UserError(f"model: {type(body).__name__} has no layers of Llama's shape; use decdec.hub for it")
    extra = set()
    for block in blocks:
        children = {name for name, _ in block.named_children()}
        if not {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"} <= children:
            raise UserError(f"model: {type(block).__name__} is not a block of Llama's shape; use decdec.hub for it")
        extra |= children - _BLOCK
        extra |= {name for name, _ in block.self_attn.named_children()} - _ATTENTION
        extra |= {name for name, _ in block.self_attn.named_parameters(recurse=False)}  # attention sinks and the like
        mlp = {name for name, _ in block.mlp.named_children()}
        extra |= mlp - _MLP | (set() if mlp & {"gate_proj", "gate_up_proj"} else {"an MLP without a gate"})
        # Where a model's code has this function it says which channels turn together: halves here, neighbours elsewhere.
        rotate = getattr(sys.modules[type(block.self_attn).__module__], "rotate_half", None)
        if rotate is not None and rotate(torch.arange(4.0)).tolist() != [-2, -3, 0, 1]:
            extra.add("interleaved rotary positions")
        extra |= set() if getattr(block.self_attn, "use_rope", True) else {"layers without rotary positions"}
    extra |= {name for name, neutral in _NEUTRAL.items() if getattr(config, name, neutral) not in (neutral, None)}
    extra |= {"llama_4_scaling_beta"} & set(getattr(config, "rope_parameters", None) or ())
    rotary = getattr(body, "rotary_emb", None)
    extra |= {"no rotary embedding of its own"} if rotary is None else set()
    extra |= {"dynamic rotary scaling"} if getattr(rotary, "rope_type", "") == "dynamic" else set()
    if extra:
        raise UserError(f"model: {config.model_type} has {', '.join(sorted(extra))}, which the static decoder has not; "
                        "use decdec.hub for it")
