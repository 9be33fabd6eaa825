"""Data-sheet figures of the GPUs in the paper's Tables 1 and 4, for tuning without the GPU at hand."""

from dataclasses import dataclass

from decdec.errors import UserError


@dataclass(frozen=True)
class Sheet:
    """``dram_gb_s``: GPU memory bandwidth; ``link_gb_s``: CPU to GPU, one direction; both GB/s as advertised."""

    name: str
    dram_gb_s: float
    link_gb_s: float
    sms: int


# The paper gives SMs in Table 1; those of Table 4 are NVIDIA's. Its H100 is the 3.36 TB/s one on a 64 GB/s link.
GPUS = {sheet.name: sheet for sheet in (
    Sheet("4090", 1008, 32, 128), Sheet("4080S", 736, 32, 80), Sheet("4070S", 504, 32, 56), Sheet("4070M", 256, 16, 36),
    Sheet("4050M", 192, 16, 20), Sheet("5080", 960, 64, 84), Sheet("3080", 760, 32, 68), Sheet("H100", 3360, 64, 132),
    Sheet("GH200", 3360, 450, 132))}


def sheet_of(name: str) -> Sheet:
    found = {key.lower(): sheet for key, sheet in GPUS.items()}.get(name.lower().removeprefix("rtx").strip(" -_"))
    if found is None:
        raise UserError(f"simulate: expected one of {', '.join(GPUS)}, got {name!r}")
    return found
