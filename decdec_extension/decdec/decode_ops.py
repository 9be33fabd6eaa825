"""The small ops of a decoding step, between its linear layers: wrappers of ``torch.ops.decdec.*`` and their fakes.

:mod:`decdec.reference` specifies them, and what runs on the CPU: there the linear layers take nearly all of a step.
On a GPU each is one kernel that may start while the one ahead of it ends; x is float16 or bfloat16 there. Sums are
accumulated in float32.
"""

import torch
from torch import Tensor

from decdec import _library, reference

_library.load()
_ops = torch.ops.decdec
for _name in ("rms_norm", "silu_mul", "attend", "argmax"):
    torch.library.impl(f"decdec::{_name}", "CPU")(getattr(reference, _name))


@torch.library.impl("decdec::head_gemv", "CPU")
def _(x, weight, scale=None):
    # Unlike the reference without a float32 copy of the whole matrix.
    return reference.head_gemv(x, weight, scale) if scale is not None else torch.nn.functional.linear(x, weight).float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` of every row of ``x`` ``(rows, width)``, in its dtype; ``weight`` ``(width,)``.

    On a GPU ``width`` is a multiple of 8 and at most 32768.
    """
    return _ops.rms_norm(x, weight, eps)


def silu_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of every row ``[gate, up]`` of ``x`` ``(rows, 2 width)``; on a GPU width is 8 n."""
    return _ops.silu_mul(x)


def attend(qkv: Tensor, position: Tensor, keys: Tensor, values: Tensor, frequencies: Tensor, rotary_scaling: float,
           long_from: int, scaling: float, window: int, q_norm: Tensor | None = None, k_norm: Tensor | None = None,
           eps: float = 1e-6, live_at_most: int = 0, workspace: Tensor | None = None) -> Tensor:
    """Attention of one token at ``position`` int64 ``(1,)``: ``(1, heads * head_dim)`` in the dtype of ``qkv``.

    ``qkv`` is ``(1, (heads + 2 kv_heads) * head_dim)``. Its key, normed by ``k_norm`` ``(head_dim,)`` if given and
    turned by the position, and its value are written to ``keys`` and ``values`` ``(kv_heads, places, head_dim)`` at
    ``position``, below ``places``; the queries, normed and turned alike, attend to the places up to it, the last
    ``window`` of them if that is not 0. ``frequencies`` float32 ``(1 or 2, rotary / 2)``: radians a position of the
    pairs ``(i, i + rotary / 2)`` of a head; positions from ``long_from`` on take the last row. Sines and cosines are
    multiplied by ``rotary_scaling``, scores by ``scaling``.

    On a GPU ``head_dim`` is a multiple of 8 and at most 256, and the cost goes with the live length; ``live_at_most``,
    a bound of it that is known (0: none), makes short sequences faster. ``workspace`` is uint8, all zero between calls,
    ``4 * heads`` bytes; calls that may overlap need one each. ``position`` and earlier places are read while the kernel
    of this library that comes just before still runs: it must not write them. The order of sums depends on
    ``live_at_most`` and the number of SMs alone.
    """
    return _ops.attend(qkv, position, keys, values, frequencies, rotary_scaling, long_from, scaling, window, q_norm,
                       k_norm, eps, live_at_most, workspace)


def head_gemv(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Logits float32 ``(1, vocab)`` of the hidden state ``x`` ``(1, width)``.

    ``weight`` is ``(vocab, width)`` in the dtype of ``x``, or int8 with float32 ``scale`` ``(vocab,)``. On a GPU
    ``width`` is a multiple of 8, of int8 weights of 16, and at most 32768, on GPUs with 99 KB of shared memory a block 25344.
    """
    return _ops.head_gemv(x, weight, scale)


def argmax(x: Tensor, workspace: Tensor | None = None) -> Tensor:
    """Where the largest of ``x`` float32 ``(1, width)`` is, int64 ``(1,)``: the lowest place of equals, NaN above all.

    On a GPU ``workspace`` is uint8, all zero between calls, 16 bytes; calls that may overlap need one each.
    """
    return _ops.argmax(x, workspace)


@torch.library.register_fake("decdec::argmax")
def _(x, workspace=None):
    return x.new_empty((1,), dtype=torch.int64)


@torch.library.register_fake("decdec::rms_norm")
def _(x, weight, eps):
    return torch.empty_like(x)


@torch.library.register_fake("decdec::silu_mul")
def _(x):
    return x.new_empty((x.shape[0], x.shape[1] // 2))


@torch.library.register_fake("decdec::attend")
def _(qkv, position, keys, values, frequencies, rotary_scaling, long_from, scaling, window, q_norm=None, k_norm=None,
      eps=1e-6, live_at_most=0, workspace=None):
    return qkv.new_empty((1, qkv.shape[1] - 2 * keys.shape[0] * keys.shape[2]))


@torch.library.register_fake("decdec::head_gemv")
def _(x, weight, scale=None):
    return x.new_empty((1, weight.shape[0]), dtype=torch.float32)
