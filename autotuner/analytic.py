"""Expected time against k_chunk: the paper's law (section 5.1), and the same law with the fixed costs that a GPU shows.

The law: fetching is hidden behind the base GEMV until the knee, then time grows with the bytes fetched. It takes both
the base GEMV and the link at their full rates. Measured kernels add a fixed cost to the fetching side (selection, the
first byte over the link, the merge), and slow the base GEMV once too few SMs are left to it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from shapes import Layer

from decdec.reference import CHUNK


@dataclass(frozen=True)
class Rates:
    """What bounds a GPU. ``dram_gb_s`` and ``link_gb_s`` are rates reached, not advertised.

    The defaults of the others: one fetching block reaches 9 GB/s of link and fetching costs 6.5 us besides its bytes, as
    a first kernel showed on an H100 (2026-11-22); a base GEMV needs 60 % of the SMs to keep its full rate, an assumption
    that agrees with the paper's 4050M, where 8 of 20 SMs may fetch and 16 may not; each small kernel of a static repair
    takes 3.7 us in a graph besides its bytes (an H100, 2026-11-22: 7.5 us for the two of rank 8 at 4096 x 4096).
    """

    dram_gb_s: float
    link_gb_s: float
    sms: int
    block_gb_s: float = 9.0
    fixed_us: float = 6.5
    busy_sms: float = 0.6
    launch_us: float = 1.0
    small_us: float = 3.7

    def without_fixed_costs(self) -> "Rates":
        """The paper's law: fetching costs its bytes alone, and takes no SM from the base GEMV."""
        return replace(self, block_gb_s=math.inf, fixed_us=0.0, busy_sms=0.0, launch_us=0.0, small_us=0.0)


def knee(bits: int, residual_bits: int, dram_gb_s: float, link_gb_s: float) -> float:
    """k_chunk up to which fetching is hidden: ``1024 / R_bw * bits / residual_bits``."""
    return CHUNK * link_gb_s / dram_gb_s * bits / residual_bits


def normalised_law(k_chunk: float, knee_at: float) -> float:
    """The paper's law: time over that of the base GEMV, 1 up to the knee and proportional to k_chunk from there."""
    return max(1.0, k_chunk / knee_at)


def base_us(layer: Layer, rates: Rates, sms: int | None = None) -> float:
    """Time of the base GEMV on ``sms`` SMs (default all), microseconds."""
    needed = rates.busy_sms * rates.sms
    share = min(1.0, (rates.sms if sms is None else sms) / needed) if needed else 1.0
    return rates.launch_us + layer.base_bytes / (rates.dram_gb_s * 1e3 * share)


def fetch_us(layer: Layer, k_chunk: int, link_gb_s: float, fixed_us: float) -> float:
    """Time of the fetching side alone, microseconds."""
    return fixed_us + layer.residual_bytes(k_chunk) / (link_gb_s * 1e3)


def repair_us(layer: Layer, rates: Rates) -> float:
    """Time of a layer's static repair, two small products, microseconds."""
    return 2 * rates.small_us + layer.repair_bytes / (rates.dram_gb_s * 1e3) if layer.repair_rank else 0.0


def compensated_us(layer: Layer, n_tb: int, k_chunk: int, rates: Rates) -> float:
    """Time of the compensated GEMV with ``n_tb`` fetching blocks, and of the repair that comes with it, microseconds."""
    if k_chunk == 0:
        return base_us(layer, rates)
    link = min(rates.link_gb_s, n_tb * rates.block_gb_s)
    fetch = fetch_us(layer, k_chunk, link, rates.fixed_us)
    return max(base_us(layer, rates, max(1, rates.sms - n_tb)), fetch) + repair_us(layer, rates)


def fitted_fixed_us(layer: Layer, points: Iterable[tuple[int, float]], base: float, link_gb_s: float) -> float:
    """The fixed cost of fetching that measured ``(k_chunk, us)`` show: what is left of the time without the link's, at
    the median.

    Only points well above the ``base`` time, in the upper half of the range, tell it: below, fetching is hidden. 0 if
    there are none.
    """
    points = list(points)
    middle = max((k for k, _ in points), default=0) / 2
    left = [us - fetch_us(layer, k, link_gb_s, 0.0) for k, us in points if us > 1.2 * base and k >= middle]
    return max(0.0, sorted(left)[len(left) // 2]) if left else 0.0
