"""What thresholds.py and repair.py share: an artifact of what calibration text shows block by block, which a kill only delays."""

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from decdec.artifacts import QuantConfig
from decdec.errors import UserError
from decdec.models import load_tokenizer
from decdec.text import Text, calibration_identity, calibration_samples

from base_model import BaseModel
from blocks import BlockRunner
from parts import Parts
from quantized_blocks import QuantizedBlocks
from scaling import read_scaling

# Given the runner, the folder's scaling, its quantized blocks and the blocks to do: yields (block, its tensors by name).
OfBlocks = Callable[[BlockRunner, dict[str, Tensor], QuantizedBlocks, set[int]], Iterator[tuple[int, dict[str, Tensor]]]]


def is_made(path: Path, load: Callable, quant: QuantConfig, calibration: dict) -> bool:
    """Whether ``path``, which ``load`` reads, is of these weights and of this calibration, and so need not be made again."""
    try:
        return path.is_file() and calibration_identity(load(path, quant).calibration) == calibration_identity(calibration)
    except UserError:
        return False  # made for other weights, or damaged


def by_block(folder: Path, base: BaseModel, documents: Text, calibration: dict, device: str, parts: Parts,
             of_blocks: OfBlocks) -> dict[str, Tensor]:
    """The tensors of all blocks, on the CPU. Those that ``parts`` does not hold yet are made on ``documents`` with the
    ``samples``, ``length`` and ``seed`` of ``calibration``, and kept in it.
    """
    todo = {index for index in range(len(base.blocks)) if not parts.has(index)}
    if todo:
        tokens = calibration_samples(documents, load_tokenizer(str(base.folder)),
                                     *(calibration[key] for key in ("samples", "length", "seed")))
        runner = BlockRunner(base.model, tokens, device, base.block)
        for index, tensors in of_blocks(runner, read_scaling(folder), QuantizedBlocks(folder), todo):
            parts.save(index, tensors)
    return {name: tensor for index in range(len(base.blocks)) for name, tensor in parts.load(index).items()}
