"""What is tuned: the kinds of linear layer of a model, fused as the decoder runs them."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from decdec import artifacts, packing
from decdec.errors import UserError
from decdec.models import KINDS, block_of, decoder_linears, layer_kind
from decdec.reference import chunk_counts
from decdec.sizes import HEAD_DIM, NAMED, bits_of_blocks


@dataclass(frozen=True)
class Layer:
    """A kind of layer at one bit width, in all blocks or in one ``block``; ``count`` of them run for each token.

    ``repair_rank``: of the static repair that comes with its compensation, of the block where it is largest.
    """

    kind: str
    bits: int
    d_in: int
    d_out: int
    count: int
    format: str = "codebook"
    group_size: int | None = None
    residual_bits: int = 4
    nested: bool = False
    block: int | None = None
    repair_rank: int = 0

    @property
    def label(self) -> str:
        return f"{self.kind} {self.bits}-bit" + ("" if self.block is None else f" of block {self.block}")

    @property
    def base_bytes(self) -> int:
        """Bytes of packed base weights that one GEMV streams."""
        if self.format == "codebook":
            tables = self.d_out * (2 * 2**self.bits + 4)
        else:
            tables = 2 * 2 * self.d_out * (self.d_in // (self.group_size or self.d_in))
        return self.d_in * self.d_out * self.bits // 8 + tables

    @property
    def repair_bytes(self) -> int:
        """Bytes of the static repair that one step streams."""
        return 2 * self.repair_rank * (self.d_in + self.d_out)

    def residual_bytes(self, k_chunk: int) -> int:
        """Bytes of residual rows that cross the link for one token."""
        return sum(chunk_counts(self.d_in, k_chunk)) * packing.residual_row_bytes(self.d_out, self.residual_bits)


@dataclass(frozen=True)
class Shapes:
    """The layers of a model, and what else identifies it. ``head_bytes``: its output head, read once a token."""

    name: str
    method: str
    layers: tuple[Layer, ...]
    head_bytes: int
    weights_hash: str | None = None


def random_weights(name: str, bits: float, format: str, each_block: bool = False) -> Shapes:
    """A known model's shapes; ``bits`` 3.5 is half of the blocks at 3 and half at 4 bits. Uniform weights have groups
    of 128. Blocks are told apart only if ``each_block``."""
    if name not in NAMED:
        raise UserError(f"random-weights: expected one of {', '.join(NAMED)}, got {name!r}")
    hidden, mlp, heads, kv_heads, blocks, vocabulary = NAMED[name]
    widths = {"qkv": (hidden, HEAD_DIM * (heads + 2 * kv_heads)), "o": (HEAD_DIM * heads, hidden),
              "gu": (hidden, 2 * mlp), "d": (mlp, hidden)}
    parts = Counter((b, block if each_block else None) for block, b in enumerate(bits_of_blocks(bits, blocks)))
    group = None if format == "codebook" else 128
    layers = tuple(Layer(kind, b, *widths[kind], count, format, group, block=block)
                   for (b, block), count in parts.items() for kind in KINDS)
    return Shapes(name, f"random {format}", layers, 2 * hidden * vocabulary)


def from_folder(folder: str | Path, each_block: bool = False, repair: bool = False) -> Shapes:
    """The shapes of a DecDEC folder: layers of one block that share kind and bits are one, as the decoder fuses
    them. Blocks are told apart only if ``each_block``. ``repair``: with the folder's static repair."""
    from transformers import AutoConfig, AutoModelForCausalLM

    quant = artifacts.read_quant_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: config.json: {str(error).splitlines()[0]}") from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    fused = defaultdict(list)
    for name, linear in decoder_linears(model).items():
        if name in quant.dense:  # left unquantized by import_checkpoint.py: nothing to compensate
            continue
        fused[block_of(name), layer_kind(name), quant.bits_of(name)].append(linear)
    ranks = Counter()
    for name, found in artifacts.load_repair(Path(folder) / artifacts.REPAIR, quant).layers.items() if repair else ():
        ranks[block_of(name), layer_kind(name)] += len(found.down)
    sheet_path = Path(folder) / (artifacts.REPAIRED_CHEATSHEET if repair else artifacts.CHEATSHEET)
    residual_bits, nested = 4, False
    if sheet_path.is_file():
        sheet = artifacts.load_cheatsheet(sheet_path, quant)
        residual_bits, nested = sheet.bits, sheet.nested
    counts = Counter((kind, bits, linears[0].in_features, sum(linear.out_features for linear in linears),
                      block if each_block else None) for (block, kind, bits), linears in fused.items())
    largest = {kind: max(rank for (_, of), rank in ranks.items() if of == kind) for _, kind in ranks}
    layers = tuple(Layer(kind, bits, d_in, d_out, count, quant.format, quant.group_size, residual_bits, nested, block,
                         largest.get(kind, 0)) for (kind, bits, d_in, d_out, block), count in counts.items())
    if len({(layer.kind, layer.bits, layer.block) for layer in layers}) < len(layers):
        raise UserError(f"{folder}: layers of one kind and bit width differ in shape; "
                        "the tuner chooses by kind and bits")
    head = model.get_output_embeddings().weight
    return Shapes(Path(folder).resolve().name, quant.method, layers, 2 * head.numel(), quant.weights_hash)
