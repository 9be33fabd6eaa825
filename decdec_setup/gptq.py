"""GPTQ: input channels are rounded one after the other, and the error of each is made good on those still to come.

Over the calibration tokens a layer errs by ``tr(D H D^T)``, ``D`` being the weight error and ``H = X X^T``. Once channel ``i``
is rounded, the least error is reached by adding ``-e_i U[i, i+1:] / U[i, i]`` to the rest of each row, where ``U`` is the
upper triangle with ``H^-1 = U^T U`` and ``e_i`` what the rounding took. Blocks are quantized first to last, each on the
outputs of the quantized ones before it.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from decdec import reference
from decdec.errors import UserError

from blocks import BlockRunner, block_linears
from groups import Group, find_groups, watch
from quantized_blocks import PARTS
from uniform import encode, grid, pack_grid

DAMPING = 0.01  # share of each channel's own energy that is added to it, for calibration text without end
COLUMNS_AT_ONCE = 128  # what lies beyond is updated by one product for so many columns


@torch.no_grad()
def quantize_blocks(runner: BlockRunner, bits: Sequence[int], group_size: int, todo: set[int],
                    part: Callable[[int], dict[str, Tensor]], act_order: bool = True) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield ``(block, packed tensors)`` for the blocks in ``todo``, first block first; ``bits`` counts by block.

    ``part`` gives the packed tensors of a block that is not in ``todo``: those after it are calibrated on its output.
    """
    hidden = runner.embed()
    for index in tqdm(range(max(todo) + 1), desc="GPTQ", unit="block"):
        block = runner.copy_block(index)
        if index in todo:
            groups = find_groups(runner, index, block, hidden[0])
            with watch(groups):
                for state in hidden:
                    runner.call(index, block, state)
            tensors: dict[str, Tensor] = {}
            for group in groups:
                tensors |= _quantize_group(group, bits[index], group_size, act_order)
        else:
            tensors = part(index)
        if index < max(todo):
            for name, module in block_linears(runner, index, block).items():
                packed = (tensors[f"{name}.{key}"].to(module.weight.device) for key in PARTS["uniform"])
                module.weight.copy_(reference.uniform_dequantize(*packed, module.in_features, torch.float32))
            hidden = runner.advance(index, block, hidden)
        if index in todo:
            yield index, tensors


def _quantize_group(group: Group, bits: int, group_size: int, act_order: bool) -> dict[str, Tensor]:
    """Packed tensors of layers that read the same input; their rows go through the columns together."""
    linears = group.linears
    for name, module in linears.items():
        if not bool(module.weight.isfinite().all()):
            raise UserError(f"model: {name} has weights that are not finite")
    weight = torch.cat([module.weight for module in linears.values()])
    results = quantize_rows(weight, group.gram, group.tokens, bits, group_size, act_order)
    widths = [module.out_features for module in linears.values()]
    tensors: dict[str, Tensor] = {}
    for name, codes, scale, zero in zip(linears, *(result.split(widths) for result in results)):
        tensors |= pack_grid(name, codes, scale, zero, bits)
    return tensors


def quantize_rows(weight: Tensor, gram: Tensor, tokens: int, bits: int, group_size: int,
                  act_order: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 ``(d_out, d_in)``, scales and zeros float32 ``(d_out, groups)`` of float32 weights ``(d_out, d_in)``.

    ``gram`` is ``X X^T`` ``(d_in, d_in)`` of ``tokens`` inputs. With ``act_order`` channels are taken by falling energy, and every
    grid is laid beforehand; without, in their natural order, and a group's grid is laid when its first channel is reached.
    """
    d_in = weight.shape[1]
    order = torch.arange(d_in, device=weight.device)
    if act_order:
        order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    group_of = (order // group_size).tolist()
    grouped = weight.unflatten(1, (-1, group_size))
    scale, zero = grid(grouped.amin(-1), grouped.amax(-1), bits)
    upper = inverse_factor(gram[order][:, order], tokens)
    weight = weight[:, order]
    codes = torch.empty_like(weight, dtype=torch.uint8)
    step = -(-COLUMNS_AT_ONCE // group_size) * group_size
    for start in range(0, d_in, step):
        part = weight[:, start:start + step].clone()
        triangle = upper[start:start + step, start:start + step]
        errors = torch.empty_like(part)
        for i in range(part.shape[1]):
            g = group_of[start + i]
            if not act_order and i % group_size == 0:
                ahead = part[:, i:i + group_size]
                scale[:, g], zero[:, g] = grid(ahead.amin(1), ahead.amax(1), bits)
            code = encode(part[:, i:i + 1], scale[:, g], zero[:, g], bits)[:, 0]
            errors[:, i] = (part[:, i] - (code - zero[:, g]) * scale[:, g]) / triangle[i, i]
            part[:, i + 1:].addr_(errors[:, i], triangle[i, i + 1:], alpha=-1)
            codes[:, start + i] = code
        weight[:, start + step:].addmm_(errors, upper[start:start + step, start + step:], alpha=-1)
    natural = torch.empty_like(codes)
    natural[:, order] = codes
    return natural, scale, zero


def inverse_factor(gram: Tensor, tokens: int) -> Tensor:
    """Upper triangular ``U`` with ``(gram + damping)^-1 = U^T U``, float32; more damping where rounding needs it.

    Each channel is damped by a share of its own energy, which shrinks correlations and leaves the rest: those estimated from
    ``tokens`` inputs are off by about ``d_in / tokens``. GPTQ's own damping, the same for all channels, is a share of the mean
    energy. That mean is made by the few channels and tokens of massive activations, and drowns all others: SmolLM2 at 3 bits
    then has a perplexity of 53 on WikiText-2, and 44 so (round-to-nearest 72).
    """
    energy = gram.diagonal()
    mean = float(energy.mean())
    if mean != mean or mean == float("inf"):
        raise UserError("model: calibration gives activations that are not finite")
    damping = (DAMPING + len(gram) / tokens) * torch.where(energy > 0, energy, mean if mean > 0 else 1.0)
    while True:
        # Reversed rows and columns turn the lower Cholesky factor into an upper one: gram = V V^T, so U = V^-1.
        lower, failed = torch.linalg.cholesky_ex((gram + damping.diag()).flip(0, 1))
        if not int(failed):
            return torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(gram), device=gram.device), upper=True)
        damping = damping * 10
