"""AWQ: uniform quantization after scaling up the input channels that the activations make important, then clipping.

Both searches measure the error of a layer's output. Over the calibration tokens that is ``|| D X ||^2 = tr(D G D^T)`` with
``D`` the weight error and ``G = X X^T``, so one matrix a group of layers stands for all tokens and no search step runs a layer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from blocks import BlockRunner, in_turn
from groups import Group, find_groups, watch
from scaling import scaled
from uniform import fake_quantize, pack_uniform

SCALE_STEPS = 20  # ratios 0, 1/20 .. 19/20 of the activations' magnitude
CLIP_STEPS = 10  # ranges 1, 19/20 .. 11/20 of the largest weight
UNCLIPPED = ("q_proj", "k_proj", "qkv_proj")  # AWQ leaves these: a score is a product of two clipped errors
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Producer:
    """The module whose rows ``rows`` can take the inverse of a group's scales: a norm or a linear layer.

    ``offset`` is what a norm adds to its weight: 1 where the stored weight is a difference from 1, as Gemma's.
    """

    name: str
    module: nn.Module
    rows: slice | None = None  # all
    offset: float = 0.0

    def fold(self, inverse: Tensor) -> None:
        """Multiply the outputs ``rows`` by ``inverse``, in place."""
        full = self.spread(inverse)
        self.module.weight.copy_(scaled(self.module.weight, full, None, self.offset))
        if getattr(self.module, "bias", None) is not None:
            self.module.bias.mul_(full)

    def spread(self, inverse: Tensor) -> Tensor:
        """``inverse`` over all rows of the module, 1 outside ``rows``."""
        full = torch.ones(len(self.module.weight), device=inverse.device)
        full[self.rows or slice(None)] = inverse
        return full


@torch.no_grad()
def quantize_blocks(runner: BlockRunner, bits: Sequence[int], group_size: int,
                    todo: set[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield ``(block, packed tensors and scale vectors)`` for the blocks in ``todo``, first block first.

    ``bits`` counts by block.
    """
    yield from in_turn(_prepared(runner, bits, group_size, todo), len(runner.devices))


def _prepared(runner: BlockRunner, bits: Sequence[int], group_size: int,
              todo: set[int]) -> Iterator[Callable[[], tuple[int, dict[str, Tensor]]]]:
    """For each block in ``todo``, once the calibration text went through it, what searches it."""
    hidden = runner.embed()
    for index in tqdm(range(max(todo) + 1), desc="AWQ", unit="block"):
        block = runner.copy_block(index)
        groups = find_groups(runner, index, block, hidden[0]) if index in todo else []
        producers = [find_producer(runner, index, block, group, groups, hidden[0]) for group in groups]
        with watch(groups):
            hidden = runner.advance(index, block, hidden)
        if index in todo:
            yield partial(_search, index, groups, producers, bits[index], group_size)


@torch.no_grad()
def _search(index: int, groups: list[Group], producers: list[Producer | None], bits: int,
            group_size: int) -> tuple[int, dict[str, Tensor]]:
    scaling: dict[str, Tensor] = {}
    for group, producer in zip(groups, producers):
        if producer is not None:
            scaling |= scale_group(group, producer, bits, group_size)
    tensors = {}
    for group in groups:
        for name, module in group.linears.items():
            limit = None if name.endswith(UNCLIPPED) else search_clip(module.weight, group.gram, bits, group_size)
            tensors |= pack_uniform(name, module.weight, bits, group_size, limit)
    # Layers of a group share one vector; a file does not hold shared tensors.
    return index, tensors | {name: vector.cpu().clone() for name, vector in scaling.items()}


def find_producer(runner: BlockRunner, index: int, block: nn.Module, group: Group, groups: list[Group],
                  hidden: Tensor) -> Producer | None:
    """What can take the inverse scales of a group without changing the block; None if nothing can.

    The norm that made the group's input, or else a linear layer called before it, whose rows a product may have passed through
    one by one: values through attention, ``up`` through the gate. Each is tried on the block itself.
    """
    expected = runner.call(index, block, hidden)
    width = group.first[1].in_features
    # By powers of two, which float32 multiplies exactly, so that what is undone below leaves no trace.
    probe = torch.where(torch.arange(width, device=expected.device) % 3 == 0, 2.0, 0.5)
    for producer in _candidates(group, groups, width):
        before = [(parameter, parameter.clone()) for parameter in producer.module.parameters()]
        producer.fold(1 / probe)
        for module in group.linears.values():
            module.weight.mul_(probe)
        change = (runner.call(index, block, hidden) - expected).norm() / expected.norm()
        for module in group.linears.values():
            module.weight.div_(probe)
        for parameter, value in before:
            parameter.copy_(value)
        if change < 1e-3:
            return producer
    return None


def _candidates(group: Group, groups: list[Group], width: int) -> Iterator[Producer]:
    if group.norm is not None:
        yield Producer(*group.norm)
        yield Producer(*group.norm, offset=1.0)
        return
    earlier = [item for other in groups[:groups.index(group)] for item in other.linears.items()]
    for name, module in reversed(earlier):
        for start in range(module.out_features - width, -1, -width) if module.out_features % width == 0 else ():
            yield Producer(name, module, slice(start, start + width))


def scale_group(group: Group, producer: Producer, bits: int, group_size: int) -> dict[str, Tensor]:
    """Search a group's scales and fold them into its layers and its producer, in place.

    Returns the scale vectors by their names in ``scaling.safetensors``. The group's gram becomes that of its scaled inputs.
    """
    scale = search_scale(group, bits, group_size)
    if producer.offset:
        scale = _representable(scale, producer)
    scaling: dict[str, Tensor] = {}
    for name, module in group.linears.items():
        module.weight.mul_(scale)
        scaling[f"{name}.input_scale"] = scale
    group.gram.div_(torch.outer(scale, scale))
    producer.fold(1 / scale)
    scaling[f"{producer.name}.output_scale"] = producer.spread(1 / scale)
    if producer.offset:
        scaling[f"{producer.name}.output_offset"] = torch.tensor(producer.offset)
    return scaling


def _representable(scale: Tensor, norm: Producer) -> Tensor:
    """The nearest scales for which the norm's stored weight is a bfloat16: near -1 its rounding would be no small error."""
    before = norm.module.weight + norm.offset
    after = (before / scale - norm.offset).bfloat16().float() + norm.offset
    return torch.where((before != 0) & (after / before > 0), before / after, torch.ones_like(scale))


def search_scale(group: Group, bits: int, group_size: int) -> Tensor:
    """The scale per input channel, float32 ``(d_in,)``, whose quantization errs least on the outputs of the group's layers."""
    weight = torch.cat([module.weight for module in group.linears.values()])
    magnitude = (group.magnitude / group.tokens).clamp(min=1e-4)
    losses, scales = [], []
    for step in range(SCALE_STEPS):
        scale = magnitude.pow(step / SCALE_STEPS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        loss = weight.new_zeros(())
        for part in weight.split(_ROWS_AT_ONCE):
            quantized = fake_quantize((part * scale).unflatten(1, (-1, group_size)), bits).flatten(1) / scale
            error = quantized - part
            loss += ((error @ group.gram) * error).sum()
        losses.append(loss)
        scales.append(scale)
    return scales[int(torch.stack(losses).argmin())]


def search_clip(weight: Tensor, gram: Tensor, bits: int, group_size: int) -> Tensor:
    """The largest weight kept in each group, float32 ``(d_out, groups)``: least error of the group's share of the output."""
    groups = weight.shape[1] // group_size
    blocks = gram.unflatten(0, (groups, group_size)).unflatten(2, (groups, group_size))
    blocks = torch.stack([blocks[g, :, g] for g in range(groups)])  # (groups, group_size, group_size)
    limits = []
    for part in weight.split(_ROWS_AT_ONCE):
        grouped = part.unflatten(1, (groups, group_size))
        largest = grouped.abs().amax(-1)
        best, limit = torch.full_like(largest, torch.inf), largest
        for step in range(CLIP_STEPS):
            candidate = largest * (1 - step / (2 * CLIP_STEPS))
            error = (fake_quantize(grouped, bits, candidate) - grouped).transpose(0, 1)  # (groups, rows, group_size)
            loss = ((error @ blocks) * error).sum(-1).t()
            better = loss < best
            best, limit = torch.where(better, loss, best), torch.where(better, candidate, limit)
        limits.append(limit)
    return torch.cat(limits)
