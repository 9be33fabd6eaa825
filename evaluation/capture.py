"""Watching the inputs of compensated layers while a text runs through the model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from decdec import hub, models, text
from decdec.linear import CompensatedLinear


def layers_by_input(model: nn.Module) -> dict[tuple[int, str], list[CompensatedLinear]]:
    """The compensated layers by block and kind; those of one kind (q, k and v; gate and up) read the same input."""
    groups = {}
    for layer in hub.compensated_layers(model).values():
        groups.setdefault((models.block_of(layer.name), layer.kind), []).append(layer)
    return groups


def quarter_blocks(model: nn.Module) -> list[int]:
    """The blocks at a quarter, a half and three quarters of the depth: 8, 16 and 24 of 32, as in the paper."""
    count = 1 + max(block for block, _ in layers_by_input(model))
    return sorted({count * part // 4 for part in (1, 2, 3)})


@contextmanager
def watching(layers: Sequence[CompensatedLinear], see: Callable[[CompensatedLinear, Tensor], None]) -> Iterator[None]:
    """Call ``see(layer, rows)`` with the input ``(positions, in_features)`` of each of ``layers`` before it runs."""
    def hook(layer, inputs):
        see(layer, inputs[0].reshape(-1, layer.in_features))

    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def layer_inputs(model: nn.Module, ids: Tensor, wanted: Sequence[tuple[int, str]]) -> dict[tuple[int, str], Tensor]:
    """Inputs, float32 ``(positions, in_features)``, of the (block, kind) groups ``wanted`` while the model reads ``ids``."""
    groups = layers_by_input(model)
    seen = {}
    with watching([groups[key][0] for key in wanted],
                  lambda layer, rows: seen.setdefault((models.block_of(layer.name), layer.kind), rows.float().cpu())):
        model(ids[None].to(model.device), use_cache=False)
    return seen


def read_window(source: str, model: str, length: int) -> tuple[text.Text, Tensor]:
    """The evaluation text ``source`` and its first ``length`` tokens."""
    evaluation = text.load_text(source, "evaluation")
    return evaluation, text.windows(evaluation, models.load_tokenizer(model), length, 1)[0]
