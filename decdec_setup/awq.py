"""AWQ: uniform quantization after scaling up the input channels that the activations make important, then clipping.

Both searches measure the error of a layer's output. Over the calibration tokens that is ``|| D X ||^2 = tr(D G D^T)`` with
``D`` the weight error and ``G = X X^T``, so one matrix a group of layers stands for all tokens and no search step runs a layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from decdec.errors import UserError

from blocks import BlockRunner, block_linears
from uniform import fake_quantize, pack_uniform

SCALE_STEPS = 20  # ratios 0, 1/20 .. 19/20 of the activations' magnitude
CLIP_STEPS = 10  # ranges 1, 19/20 .. 11/20 of the largest weight
UNCLIPPED = ("q_proj", "k_proj", "qkv_proj")  # AWQ leaves these: a score is a product of two clipped errors
_ROWS_AT_ONCE = 1024


@dataclass
class Group:
    """Linear layers that read the same input, and what makes that input.

    ``producer`` is the module whose rows ``rows`` (all if None) can take the inverse scales: a norm or a linear layer.
    """

    linears: dict[str, nn.Linear]
    producer: tuple[str, nn.Module] | None = None
    rows: slice | None = None
    gram: Tensor | None = None  # (d_in, d_in), sum over tokens of x x^T
    magnitude: Tensor | None = None  # (d_in,), sum over tokens of |x|
    tokens: int = field(default=0)

    def see(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2)
        if self.gram is None:
            self.gram = x.new_zeros(x.shape[1], x.shape[1])
            self.magnitude = x.new_zeros(x.shape[1])
        self.gram.addmm_(x.t(), x)
        self.magnitude += x.abs().sum(0)
        self.tokens += len(x)


@torch.no_grad()
def quantize_blocks(runner: BlockRunner, bits: int, group_size: int, todo: set[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield ``(block, packed tensors and scale vectors)`` for the blocks in ``todo``, first block first."""
    hidden = runner.embed()
    for index in tqdm(range(max(todo) + 1), desc="AWQ", unit="block"):
        block = runner.copy_block(index)
        groups = find_groups(runner, index, block, hidden[0]) if index in todo else []
        hooks = [next(iter(group.linears.values())).register_forward_pre_hook(lambda _, args, group=group: group.see(args[0]))
                 for group in groups]
        first = hidden[0]
        hidden = [runner.call(index, block, state).to(runner.dtype) for state in hidden]
        for hook in hooks:
            hook.remove()
        if index in todo:
            scaling = scale_block(groups, bits, group_size)
            _check_unchanged(runner, index, block, first, hidden[0])
            tensors = {}
            for group in groups:
                for name, module in group.linears.items():
                    limit = None if name.endswith(UNCLIPPED) else search_clip(module.weight, group.gram, bits, group_size)
                    tensors |= pack_uniform(name, module.weight, bits, group_size, limit)
            # Layers of a group share one vector; a file does not hold shared tensors.
            yield index, tensors | {name: vector.cpu().clone() for name, vector in scaling.items()}


def find_groups(runner: BlockRunner, index: int, block: nn.Module, hidden: Tensor) -> list[Group]:
    """The groups of a block, found by running it once: layers called with one tensor belong together."""
    prefix = f"{runner.prefix}.{index}"
    linears = block_linears(runner, index, block)
    inputs: list[tuple[str, Tensor]] = []
    made: list[tuple[str, nn.Module, Tensor]] = []
    hooks = [module.register_forward_pre_hook(lambda _, args, name=name: inputs.append((name, args[0])))
             for name, module in linears.items()]
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) and isinstance(weight, Tensor) and weight.dim() == 1:
            hooks.append(module.register_forward_hook(
                lambda module, _, output, name=name: made.append((f"{prefix}.{name}", module, output))))
    runner.call(index, block, hidden)
    for hook in hooks:
        hook.remove()

    groups: list[tuple[Tensor, Group]] = []
    for name, tensor in inputs:
        group = next((group for seen, group in groups if seen is tensor), None)
        if group is None:
            norm = next(((norm_name, norm) for norm_name, norm, output in made if output is tensor), None)
            group = Group({}, norm if norm and _is_linear_in_weight(norm[1], tensor.shape[-1]) else None)
            groups.append((tensor, group))
        group.linears[name] = linears[name]
    found = [group for _, group in groups]
    for group in found:
        if group.producer is None:
            _find_linear_producer(group, linears)
    return found


def _is_linear_in_weight(norm: nn.Module, width: int) -> bool:
    """Whether halving weight (and bias) halves the output: true of most norms, not of those that add one to the weight."""
    x = torch.linspace(-1, 2, width, device=norm.weight.device)[None]
    before = norm(x)
    states = [(parameter, parameter.clone()) for parameter in norm.parameters()]
    for parameter, value in states:
        parameter.copy_(value / 2)
    halved = norm(x)
    for parameter, value in states:
        parameter.copy_(value)
    return torch.allclose(before / 2, halved, atol=1e-6)


def _find_linear_producer(group: Group, linears: dict[str, nn.Linear]) -> None:
    """``o`` reads what ``v`` made, and ``down`` what ``up`` made times a gate, channel by channel, where the shapes agree."""
    name, consumer = next(iter(group.linears.items()))
    parent, _, leaf = name.rpartition(".")
    width = consumer.in_features
    if leaf in ("o_proj", "dense"):
        candidates = [("v_proj", width, slice(0, width)), ("qkv_proj", 3 * width, slice(2 * width, 3 * width))]
    elif leaf == "down_proj":
        candidates = [("up_proj", width, slice(0, width)), ("gate_up_proj", 2 * width, slice(width, 2 * width))]
    else:
        candidates = []
    for producer, rows, part in candidates:
        module = linears.get(f"{parent}.{producer}")
        if module is not None and module.out_features == rows:
            group.producer, group.rows = (f"{parent}.{producer}", module), part


def scale_block(groups: list[Group], bits: int, group_size: int) -> dict[str, Tensor]:
    """Search every group's scales and fold them into its layers and its producer, in place.

    Returns the scale vectors by their names in ``scaling.safetensors``. Each group's gram becomes that of its scaled inputs.
    """
    scaling: dict[str, Tensor] = {}
    for group in groups:
        if group.producer is None:
            continue
        scale = search_scale(group, bits, group_size)
        for name, module in group.linears.items():
            module.weight.mul_(scale)
            scaling[f"{name}.input_scale"] = scale
        group.gram.div_(torch.outer(scale, scale))
        name, module = group.producer
        inverse = torch.ones(len(module.weight), device=scale.device)
        inverse[group.rows or slice(None)] = 1 / scale
        module.weight.mul_(inverse[:, None] if module.weight.dim() == 2 else inverse)
        if getattr(module, "bias", None) is not None:
            module.bias.mul_(inverse)
        scaling[f"{name}.output_scale"] = inverse
    return scaling


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


def _check_unchanged(runner: BlockRunner, index: int, block: nn.Module, hidden: Tensor, output: Tensor) -> None:
    scaled = runner.call(index, block, hidden)
    change = (scaled - output.float()).norm() / output.float().norm()
    if not change < 1e-2:
        raise UserError(f"model: folding AWQ's scales changes block {index} of {type(runner.model).__name__} by {float(change):.1%}; "
                        "quantize this architecture with squeezellm")
