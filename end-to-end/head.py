"""The output head: hidden state to logits, with the model's own weights or rounded to 8 bits."""

import torch
from torch import Tensor, nn

from decdec import decode_ops
from decdec.errors import UserError

ROWS_AT_ONCE = 8192  # of the vocabulary while rounding: bounds the float32 copy


class Head(nn.Module):
    """Logits float32 ``(vocab,)`` of a hidden state ``(1, hidden)``.

    With ``bits`` 8 every token's row is rounded to signed bytes of one scale, its largest magnitude over 127. The
    embedding that a head may be tied to stays as it is.
    """

    def __init__(self, linear: nn.Linear, bits: int = 16):
        super().__init__()
        if bits not in (8, 16):
            raise UserError(f"head_bits: expected 8 or 16, got {bits}")
        self.bits, self.bias = bits, linear.bias
        self.register_buffer("scale", None)
        if bits == 16:
            self.weight = linear.weight
            return
        parts = [part.detach().float() for part in linear.weight.split(ROWS_AT_ONCE)]
        scales = [part.abs().amax(dim=1).clamp(min=1e-12) / 127 for part in parts]
        rounded = [(part / scale[:, None]).round().to(torch.int8) for part, scale in zip(parts, scales)]
        self.register_buffer("weight", torch.cat(rounded))
        self.register_buffer("scale", torch.cat(scales))

    def forward(self, hidden: Tensor) -> Tensor:
        logits = decode_ops.head_gemv(hidden, self.weight, self.scale)[0]
        return logits if self.bias is None else logits + self.bias.float()
