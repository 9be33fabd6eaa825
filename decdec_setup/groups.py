"""The linear layers of a block that read the same input, found by running the block once, and what calibration sums over it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from blocks import BlockRunner, block_linears


@dataclass
class Group:
    """Linear layers called with one tensor, and the norm that made it, if one did (``(name, module)``)."""

    linears: dict[str, nn.Linear]
    norm: tuple[str, nn.Module] | None = None
    gram: Tensor | None = None  # (d_in, d_in), sum over tokens of x x^T
    magnitude: Tensor | None = None  # (d_in,), sum over tokens of |x|
    tokens: int = 0

    @property
    def first(self) -> tuple[str, nn.Linear]:
        return next(iter(self.linears.items()))

    def see(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2)
        if self.gram is None:
            self.gram = x.new_zeros(x.shape[1], x.shape[1])
            self.magnitude = x.new_zeros(x.shape[1])
        self.gram.addmm_(x.t(), x)
        self.magnitude += x.abs().sum(0)
        self.tokens += len(x)


def find_groups(runner: BlockRunner, index: int, block: nn.Module, hidden: Tensor) -> list[Group]:
    """The groups of ``block``, a copy of block ``index``, in the order in which they are called."""
    linears = block_linears(runner, index, block)
    inputs: list[tuple[str, Tensor]] = []
    made: list[tuple[str, nn.Module, Tensor]] = []
    hooks = [module.register_forward_pre_hook(lambda _, args, name=name: inputs.append((name, args[0])))
             for name, module in linears.items()]
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1:
            hooks.append(module.register_forward_hook(lambda module, _, output, name=f"{runner.prefix}.{index}.{name}":
                                                      made.append((name, module, output))))
    try:
        runner.call(index, block, hidden)
    finally:
        for hook in hooks:
            hook.remove()

    groups: list[tuple[Tensor, Group]] = []
    for name, tensor in inputs:
        group = next((group for seen, group in groups if seen is tensor), None)
        if group is None:
            group = Group({}, next(((norm_name, norm) for norm_name, norm, output in made if output is tensor), None))
            groups.append((tensor, group))
        group.linears[name] = linears[name]
    return [group for _, group in groups]


@contextlib.contextmanager
def watch(groups: list[Group]) -> Iterator[None]:
    """While it lasts, every call of a group's first layer is summed up in the group."""
    hooks = [group.first[1].register_forward_pre_hook(lambda _, args, group=group: group.see(args[0])) for group in groups]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
