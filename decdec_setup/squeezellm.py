"""SqueezeLLM: a codebook per output channel by 1-D k-means, weighted by the diagonal of the Fisher information.

The k-means here needs no random starts. Each row is sorted once; a coarse grid of cell borders is laid where centroids belong;
dynamic programming finds the best split over that grid; Lloyd's iterations move the borders to convergence. Sums over any
interval come from prefix sums, so an iteration costs a binary search per border and not a pass over the row.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import ceil, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from decdec.errors import UserError
from decdec.packing import pack_codebook, pack_codes

from blocks import BlockRunner, block_linears, in_float32, in_turn

CELLS = 96  # cells of the coarse grid: rows with no more distinct places than this are solved exactly
ROWS_AT_ONCE = 128  # keeps the cost table of a chunk, ROWS_AT_ONCE * CELLS**2 floats, in a CPU's cache
ROWS_AT_ONCE_CUDA = 2048  # enough to fill a GPU; the table is 80 MB
MAX_ITERATIONS = 200
HIDDEN_BYTES = 4 << 30  # of block inputs that may wait for the gradients


def quantize_blocks(runner: BlockRunner, bits: Sequence[int], todo: set[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield ``(block, packed tensors)`` for the blocks in ``todo``, last block first, as the gradients reach them.

    ``bits`` counts by block.
    """
    yield from in_turn(_prepared(runner, bits, todo), len(runner.devices))


def _prepared(runner: BlockRunner, bits: Sequence[int],
              todo: set[int]) -> Iterator[Callable[[], tuple[int, dict[str, Tensor]]]]:
    """For each block in ``todo``, once the gradients went through it, what finds its codebooks."""
    count = len(runner.blocks)
    states = [state.cpu() for state in runner.embed()]
    stride = _stride(count, sum(state.nbytes for state in states), HIDDEN_BYTES)
    kept = {0: states}  # inputs by block, in CPU memory: they wait for the way back
    for index in tqdm(range(count), desc="forward", unit="block"):
        states = _forward(runner, index, states)
        if (index + 1) % stride == 0:
            kept[index + 1] = states
    gradients = [_loss_gradient(runner, state, sample) for state, sample in zip(states, runner.samples)]
    kept.pop(count, None)
    del states
    for index in tqdm(range(count - 1, min(todo) - 1, -1), desc="backward and k-means", unit="block"):
        if index not in kept:
            for before in range(index - index % stride, index):
                kept[before + 1] = _forward(runner, before, kept[before])
        block = runner.copy_block(index)
        linears = block_linears(runner, index, block)
        fisher = {name: torch.zeros_like(module.weight) for name, module in linears.items()}
        hooks = [module.register_forward_hook(_fisher_hook(fisher[name])) for name, module in linears.items()] \
            if index in todo else []
        for i, state in enumerate(kept.pop(index)):
            state = in_float32(state, runner.device).requires_grad_()
            output = runner.call(index, block, state)
            output.backward(gradients[i].to(output.device))
            gradients[i] = state.grad
        for hook in hooks:
            hook.remove()
        if index in todo:
            yield partial(_pack_block, index, linears, fisher, bits[index])


@torch.no_grad()
def _forward(runner: BlockRunner, index: int, states: list[Tensor]) -> list[Tensor]:
    return [state.cpu() for state in runner.advance(index, runner.copy_block(index), states)]


def _stride(count: int, size: int, limit: int) -> int:
    """Every which block's inputs of ``size`` bytes are kept; those between are made again where all would pass ``limit``."""
    return 1 if count * size <= limit else ceil(sqrt(count))


def waiting_bytes(count: int, size: int, limit: int) -> int:
    """Bytes of block inputs that wait in CPU memory at most: those of ``count`` blocks kept, and one stride made again."""
    stride = _stride(count, size, limit)
    return (ceil(count / stride) + stride - 1) * size


@torch.no_grad()
def _pack_block(index: int, linears: dict[str, nn.Linear], fisher: dict[str, Tensor], bits: int) -> tuple[int, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    for name, module in linears.items():
        tensors |= pack_squeezed(name, module.weight, fisher[name], bits)
    return index, tensors


def _loss_gradient(runner: BlockRunner, hidden: Tensor, sample: Tensor) -> Tensor:
    """Gradient of the sample's summed next-token loss at the last block's output, float32."""
    hidden = in_float32(hidden, runner.device).requires_grad_()
    logits = runner.logits(hidden, sample)
    F.cross_entropy(logits[:-1].float(), sample[1:].to(logits.device), reduction="sum").backward()
    return hidden.grad


def _fisher_hook(fisher: Tensor):
    """Adds each token's squared weight gradient: that gradient is the outer product of output gradient and input."""
    def forward(module, inputs, output):
        x = inputs[0].detach().flatten(0, -2)

        def backward(gradient: Tensor) -> None:
            fisher.addmm_(gradient.flatten(0, -2).square().t(), x.square())

        output.register_hook(backward)

    return forward


def pack_squeezed(name: str, weight: Tensor, fisher: Tensor, bits: int) -> dict[str, Tensor]:
    """The packed tensors of a ``(d_out, d_in)`` weight: ``NAME.qweight``, ``NAME.codebook``, ``NAME.scale``."""
    if not bool(weight.isfinite().all()):
        raise UserError(f"model: {name} has weights that are not finite")
    codes, centroids = kmeans(weight, fisher, 2**bits)
    codebook, scale = pack_codebook(centroids)
    return {f"{name}.qweight": pack_codes(codes, bits).cpu(), f"{name}.codebook": codebook.cpu(), f"{name}.scale": scale.cpu()}


def kmeans(values: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weighted 1-D k-means of every row of ``values`` ``(rows, n)`` into ``k`` centroids.

    ``weights`` must be non-negative; what is not finite counts as zero, and every weight is raised by a thousandth of its
    row's mean, so that no value is without a say. Returns codes uint8 ``(rows, n)`` and ascending centroids float32
    ``(rows, k)``. Deterministic; float64 inside.
    """
    rows = ROWS_AT_ONCE_CUDA if values.is_cuda else ROWS_AT_ONCE
    parts = [_kmeans_rows(v, w, k) for v, w in zip(values.detach().float().split(rows), weights.split(rows))]
    return torch.cat([codes for codes, _ in parts]), torch.cat([centroids for _, centroids in parts])


def _kmeans_rows(values: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights = torch.nan_to_num(weights.double(), nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0)
    mean = weights.mean(1, keepdim=True)
    weights = torch.where(mean > 0, weights / mean, 1.0) + 1e-3

    x, order = torch.sort(values, dim=1)
    w = torch.gather(weights, 1, order)
    wx = w * x.double()
    # Sums over [0, i) for i in 0..n of w and of w x.
    sums = torch.stack([F.pad(part.cumsum(1), (1, 0)) for part in (w, wx)])
    borders = _coarse_split(x, w, sums, k)
    centroids = _centroids(borders, sums, x)
    for _ in range(MAX_ITERATIONS):
        moved = _borders(x, centroids)
        if torch.equal(moved, borders):
            break
        borders = moved
        centroids = _centroids(borders, sums, x)
    centroids = centroids.float()
    codes = torch.searchsorted((centroids[:, 1:] + centroids[:, :-1]) / 2, values)
    return codes.to(torch.uint8), centroids


def _borders(x: Tensor, centroids: Tensor) -> Tensor:
    """``(rows, k + 1)`` positions in the sorted ``x`` that part it at the midpoints between centroids."""
    inner = torch.searchsorted(x, ((centroids[:, 1:] + centroids[:, :-1]) / 2).float())
    return F.pad(F.pad(inner, (1, 0)), (0, 1), value=x.shape[1])


def _centroids(borders: Tensor, sums: Tensor, x: Tensor) -> Tensor:
    """Weighted means between borders; an empty cluster sits on the value at its border, where it can grow again."""
    w, wx = torch.gather(sums, 2, borders.expand(2, -1, -1)).diff(dim=2)
    at_border = torch.gather(x, 1, borders[:, :-1].clamp(max=x.shape[1] - 1)).double()
    return torch.where(w > 0, wx / torch.where(w > 0, w, 1.0), at_border)


def _coarse_split(x: Tensor, w: Tensor, sums: Tensor, k: int) -> Tensor:
    """``(rows, k + 1)`` borders of the best split of ``x`` into ``k`` intervals, over a grid of at most CELLS cells.

    The best centroids lie with a density that goes as the cube root of weight times density (Panter and Dite), so the cells
    get equal shares of that. With as many cells as values the grid is the row itself and the split the optimum.
    """
    rows, n = x.shape
    cells = min(CELLS, n)
    if cells == n:
        grid = torch.arange(n + 1, device=x.device).expand(rows, -1)
    else:
        spacing = x.double().diff(dim=1, prepend=x[:, :1].double())
        share = (w * spacing.square()).pow(1 / 3).cumsum(1)
        wanted = share[:, -1:] * torch.arange(1, cells, device=x.device, dtype=torch.float64) / cells
        inner = torch.searchsorted(share, wanted)
        grid = F.pad(F.pad(inner, (1, 0)), (0, 1), value=n)
    w, wx = torch.gather(sums, 2, grid.expand(2, -1, -1))
    # cost[:, a, b]: minus the squared mean that one centroid explains over cells a..b; the sum of squares is the same for all.
    mass = (w[:, None, :] - w[:, :, None]).float()
    moment = (wx[:, None, :] - wx[:, :, None]).float()
    cost = torch.where(mass > 0, -moment.square() / mass, torch.where(mass < 0, torch.inf, 0.0))
    best = cost[:, 0]  # best[:, b]: the cost of splitting cells 0..b into as many intervals as rounds so far
    choices = []
    for _ in range(k - 1):
        best, choice = (best[:, :, None] + cost).min(1)
        choices.append(choice)
    place = torch.full((rows, 1), cells, device=x.device)
    places = [place]
    for choice in reversed(choices):
        place = torch.gather(choice, 1, place)
        places.append(place)
    places.append(torch.zeros_like(place))
    return torch.gather(grid, 1, torch.cat(places[::-1], 1))
