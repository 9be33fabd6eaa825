"""Compensation beside a linear layer that another library runs: ``o = layer(x) + (R ⊙ M(x)) x``."""

from collections.abc import Mapping
from contextlib import ExitStack
from itertools import chain

import torch
from torch import Tensor, nn

from decdec.compensated import Compensated, Compensation
from decdec.errors import UserError
from decdec.linear import FEW_ROWS, CompensatedLinear

# Outputs of the same weights differ by rounding, at most some thousandths; those of others by more than a tenth.
SAME = 0.03


class Beside(Compensated):
    """Adds the residual's product to what ``layer`` gives, a quantized linear layer of another library.

    It is the layer's child ``decdec`` and hooks its forward: the library's own names, state dict and code stay as they
    are. Holds no tensor that a state dict has.
    """

    def __init__(self, layer: nn.Module, like: CompensatedLinear):
        """``like``: the layer of ours with the same weights."""
        super().__init__(like.name, like.in_features, like.out_features)
        self.bits, self.order = like.bits, None
        self._of = (layer,)  # not a child of its own child
        layer.decdec = self
        layer.register_forward_hook(lambda layer, inputs, out: layer.decdec(inputs[0], out))

    @property
    def device(self) -> torch.device:
        layer, = self._of
        return next(chain(layer.parameters(), layer.buffers())).device

    def compensate(self, compensation: Compensation) -> None:
        if compensation.repair:
            raise UserError(f"repair: layer {self.name} runs in another library's code, which it is not made for")
        super().compensate(compensation)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """``out``, the layer's own output for ``x`` ``(..., positions, in_features)``, compensated."""
        if not self._compensates(x):
            return out
        rows = x.reshape(-1, self.in_features)
        if 0 < len(rows) <= FEW_ROWS:
            return out + self._product_of_few(rows).view(out.shape)
        product = out.new_zeros((len(rows), self.out_features))
        self._add_product(rows, product)
        return out + product.view(out.shape)


def is_plain(layer: nn.Module) -> bool:
    """Whether a linear layer holds ordinary weights, so that a layer of packed ones can take its place."""
    weight = getattr(layer, "weight", None)
    return (isinstance(layer, nn.Linear) and type(weight) is nn.Parameter and weight.dtype.itemsize > 1
            and weight.shape == (layer.out_features, layer.in_features))


@torch.no_grad()
def check_weights(model: nn.Module, layers: Mapping[str, CompensatedLinear]) -> None:
    """Refuse ``model`` if its layers of these names compute something else than ``layers`` do, read from a folder.

    A token goes through the model: some libraries unpack their weights only then.
    """
    if any(tensor.is_meta for name in layers for tensor in model.get_submodule(name).state_dict().values()):
        raise UserError("model: layers that another library quantized must have their weights before attach")
    other = []

    def compare(name: str, mine: CompensatedLinear):
        def hook(_, inputs, out):
            x = inputs[0].reshape(-1, mine.in_features)[:1]
            want = mine(x)
            if not (out.reshape(-1, mine.out_features)[:1] - want).norm() <= SAME * want.norm():
                other.append(name)
        return hook

    with ExitStack() as stack:
        for name, mine in layers.items():
            handle = model.get_submodule(name).register_forward_hook(compare(name, mine))
            stack.callback(handle.remove)
        model(torch.zeros((1, 1), dtype=torch.int64, device=model.device))
    if other:
        raise UserError(f"layer {other[0]}: computes with other weights than the folder's; give the folder that "
                        "import_checkpoint.py made of this checkpoint")
