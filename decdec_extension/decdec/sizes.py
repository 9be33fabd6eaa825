"""Sizes of known models, for measurements that need a model's shapes and not its weights."""

from decdec.errors import UserError

# hidden size, MLP width, query and key/value heads, blocks, vocabulary; head size 128
NAMED = {"llama-3-8b": (4096, 14336, 32, 8, 32, 128256), "llama-3-70b": (8192, 28672, 64, 8, 80, 128256),
         "phi-3-medium": (5120, 17920, 40, 10, 40, 32064), "qwen2.5-7b": (3584, 18944, 28, 4, 28, 152064)}
HEAD_DIM = 128


def bits_of_blocks(bits: float, blocks: int) -> list[int]:
    """Bits of every block: all alike, or for a half such as 3.5 the first half of the blocks at 3 and the rest at 4."""
    if bits not in (2, 2.5, 3, 3.5, 4):
        raise UserError(f"bits: expected 2 to 4, or a half between them, got {bits:g}")
    low = blocks if bits == int(bits) else blocks - blocks // 2
    return [int(bits)] * low + [int(bits) + 1] * (blocks - low)
