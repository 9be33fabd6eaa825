"""Running a model's decoder blocks one at a time over calibration samples.

A block is called with the very arguments that the model itself passed it, so no architecture is known here. The model stays
where and as it is; the block at work is a float32 copy on the chosen device.
"""

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from decdec.errors import UserError, check_device
from decdec.models import decoder_blocks


Result = TypeVar("Result")


def in_float32(tensor: Tensor, device: torch.device, copy: bool = False) -> Tensor:
    """``tensor`` on ``device``, in float32 unless it holds integers. Converted there: half the bytes cross, none wait here."""
    moved = tensor.to(device)
    return moved.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=copy)


class _Reached(Exception):
    """The first block was reached: the rest of the model need not run."""


class BlockRunner:
    """The decoder blocks of ``model`` and their inputs over ``samples`` (int64 ``(samples, length)``).

    Everything outside the blocks (embeddings, rotary tables, final norm, head) is moved to ``device`` in float32. The blocks
    may be on the meta device if ``stored`` gives the tensors of block ``index`` by their names within it. ``device`` "cuda"
    stands for every GPU that is visible: blocks are given to them in turn, and the first holds the rest.
    """

    def __init__(self, model: nn.Module, samples: Tensor, device: str | torch.device = "cpu",
                 stored: Callable[[int], dict[str, Tensor]] | None = None):
        self.model, self.samples, self._stored = model, samples, stored
        check_device(device)
        device = torch.device(device)
        every = device.type == "cuda" and device.index is None
        self.devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if every else [device]
        self.device = self.devices[0]
        self.prefix, self.blocks = decoder_blocks(model)
        self._dtype = next(self.blocks.parameters()).dtype
        inside = {id(tensor) for tensor in (*self.blocks.parameters(), *self.blocks.buffers())}
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.requires_grad_(False)
            if id(tensor) not in inside:
                tensor.data = in_float32(tensor.data, self.device)
        self._calls: list[tuple[tuple, dict]] = []

    def embed(self) -> list[Tensor]:
        """The first block's input for every sample, each ``(1, length, d_model)``; also learns how each block is called."""
        self._learn_calls()
        hidden = []

        def reach(block: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden.append(self._waiting(_hidden_of(args, kwargs)))
            raise _Reached

        hook = self.blocks[0].register_forward_pre_hook(reach, with_kwargs=True)
        try:
            with torch.no_grad():
                for sample in self.samples:
                    with contextlib.suppress(_Reached):
                        self._forward(sample)
        finally:
            hook.remove()
        return hidden

    def copy_block(self, index: int) -> nn.Module:
        """A float32 copy of one block, on the device whose turn it is."""
        block, device = copy.deepcopy(self.blocks[index]), self.devices[index % len(self.devices)]
        if self._stored is not None:
            # Copied, since the caller works on the weights in place.
            block.load_state_dict({name: in_float32(tensor, device, copy=True) for name, tensor in self._stored(index).items()},
                                  assign=True)
        return block.to(device, torch.float32)

    def call(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Output of block ``index`` (``block`` is it, or its copy) for one sample's hidden states, float32, on its device."""
        device = next(block.parameters()).device
        args, kwargs = self._calls[index] if device == self.device else _moved(self._calls[index], device)
        hidden = in_float32(hidden, device)
        output = block(*((hidden, *args[1:]) if args else ()), **(kwargs if args else kwargs | {"hidden_states": hidden}))
        output = output[0] if isinstance(output, tuple) else output
        if not bool(output.isfinite().all()):
            raise UserError(f"model: {self.prefix}.{index} gives activations that are not finite on the calibration text")
        return output

    def advance(self, index: int, block: nn.Module, hidden: list[Tensor]) -> list[Tensor]:
        """Outputs of block ``index`` (``block`` is it, or its copy) for every sample, as the next block's inputs wait for it."""
        return [self._waiting(self.call(index, block, state)) for state in hidden]

    def _waiting(self, state: Tensor) -> Tensor:
        """``state`` in the precision that the model was published in, or in float32 where it is beyond that one's range."""
        rounded = state.to(self._dtype)
        return rounded if bool(rounded.isfinite().all()) else state

    def logits(self, hidden: Tensor, sample: Tensor) -> Tensor:
        """Logits ``(length, vocabulary)`` that follow from the last block's output ``hidden``."""
        hidden = in_float32(hidden, self.device)
        with self._pass_through(lambda index, value: hidden if index == len(self.blocks) - 1 else value):
            return self._forward(sample).logits[0]

    def _forward(self, sample: Tensor):
        return self.model(input_ids=sample[None].to(self.device), use_cache=False)

    def _learn_calls(self) -> None:
        def passed(index: int, value: Tensor) -> Tensor:
            return value

        hooks = [block.register_forward_pre_hook(lambda _, args, kwargs: self._calls.append((args, kwargs)), with_kwargs=True)
                 for block in self.blocks]
        self._calls.clear()
        try:
            with torch.no_grad(), self._pass_through(passed):
                self._forward(self.samples[0])
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def _pass_through(self, output: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        """Let every block return ``output(index, its input)`` without computing anything."""
        def replace(index: int) -> Callable:
            def forward(*args, **kwargs):
                return output(index, _hidden_of(args, kwargs))
            return forward

        try:
            for index, block in enumerate(self.blocks):
                block.forward = replace(index)
            yield
        finally:
            for block in self.blocks:
                del block.forward


def _moved(value, device: torch.device):
    """``value`` with every tensor in its tuples, lists and dicts on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    return type(value)(_moved(part, device) for part in value) if isinstance(value, (tuple, list)) else value


def in_turn(jobs: Iterator[Callable[[], Result]], at_once: int) -> Iterator[Result]:
    """The results of ``jobs`` in their order, ``at_once`` of them on threads while ``jobs`` prepares the next.

    For jobs that keep ``at_once`` devices busy in turn: job ``i + at_once`` is prepared when job ``i`` is done.
    """
    if at_once == 1:
        for job in jobs:
            yield job()
        return
    with ThreadPoolExecutor(at_once) as pool:
        pending: deque = deque()
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) == at_once:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _hidden_of(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def block_linears(runner: BlockRunner, index: int, block: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a block (or of its copy) by their full names in the model."""
    return {f"{runner.prefix}.{index}.{name}": module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
