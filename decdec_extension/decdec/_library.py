"""Loads the compiled ops of this package into torch."""

from pathlib import Path

import torch

_BUILD = "pip install --no-build-isolation ./decdec_extension"


def load() -> None:
    """Register ``torch.ops.decdec.*``; an ImportError says how to build them when the library is not there."""
    found = sorted(Path(__file__).parent.glob("_ops*.so"))
    if not found:
        raise ImportError(f"decdec: the compiled ops are missing from {Path(__file__).parent}; build them with: {_BUILD}")
    torch.ops.load_library(str(found[0]))
