"""Rows of a profile, and the table of times that the tuner reads from them."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from shapes import Layer

from decdec.errors import UserError
from decdec.files import read_rows

RATES = ("device", "sms", "library", "dram_gb_s", "link_gb_s")
SHAPE = ("format", "bits", "group_size", "d_in", "d_out", "residual_bits", "nested", "repair_rank")


def shape_of(layer: Layer) -> tuple:
    """What the times of a layer depend on: layers that agree in it are measured once."""
    return tuple(getattr(layer, key) for key in SHAPE)


@dataclass(frozen=True)
class Conditions:
    """What a time depends on besides shape and settings. ``library``: hash of the compiled kernels, ``simulated`` for
    none."""

    device: str
    sms: int
    library: str
    dtype: str
    selection: str


def timing_row(conditions: Conditions, layer: Layer, n_tb: int, k_chunk: int, us: float, spread: float,
               samples: int) -> dict:
    """One measured time. ``spread`` is the interquartile range of the samples over their median ``us``."""
    return {"what": "timing", **vars(conditions), **{key: getattr(layer, key) for key in SHAPE}, "n_tb": n_tb,
            "k_chunk": k_chunk, "us": us, "spread": spread, "samples": samples}


def read_profile(path: str | Path, missing_ok: bool = False) -> list[dict]:
    """The rows of a profile; a file that is none is refused, one that is not there yet has none if ``missing_ok``."""
    if not Path(path).exists():
        if missing_ok:
            return []
        raise UserError(f"profile: {path}: no such file; run_profile.py writes it")
    try:
        rows = read_rows(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"profile: {path}: expected a file of JSON lines, got one that cannot be read "
                        f"({error})") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or row.get("what") not in ("timing", "rates"):
            raise UserError(f"profile: {path}, row {number}: expected a row of run_profile.py, got {str(row)[:60]}")
        if row["what"] == "rates" and (missing := [key for key in RATES if key not in row]):
            raise UserError(f"profile: {path}, row {number}: rates without {', '.join(missing)}; profile again")
    if not rows:
        raise UserError(f"profile: {path}: expected rows of run_profile.py, got an empty file")
    return rows


class Timings:
    """Times of ``layers`` under ``conditions``: ``points[layer][n_tb][k_chunk]`` microseconds, base times at n_tb 0,
    k_chunk 0."""

    def __init__(self, layers: Sequence[Layer], conditions: Conditions, rows: Iterable[dict] = ()):
        self.layers, self.conditions = tuple(layers), conditions
        shared = defaultdict(lambda: defaultdict(dict))  # layers of one shape share their points
        self.points: dict[Layer, dict[int, dict[int, float]]] = {layer: shared[shape_of(layer)] for layer in layers}
        self._seen = defaultdict(list)
        one_of = {shape_of(layer): layer for layer in self.layers}
        same = vars(conditions).items()
        for row in rows:
            if row["what"] != "timing" or any(row.get(key) != value for key, value in same):
                continue
            try:
                if layer := one_of.get(tuple(({"repair_rank": 0} | row)[key] for key in SHAPE)):
                    self.add(layer, int(row["n_tb"]), int(row["k_chunk"]), float(row["us"]))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"profile: a timing row misses or garbles a field ({type(error).__name__}: {error}); "
                                "profile again") from None

    def add(self, layer: Layer, n_tb: int, k_chunk: int, us: float, anew: bool = False) -> None:
        """One more measurement of a point, whose time is the median of all; ``anew``: those before no longer count."""
        if not us > 0:
            raise UserError(f"profile: {layer.label}, n_tb {n_tb}, k_chunk {k_chunk}: expected a positive time, "
                            f"got {us}")
        seen = self._seen[shape_of(layer), n_tb, k_chunk]
        if anew:
            seen.clear()
        seen.append(us)
        self.points[layer][n_tb][k_chunk] = statistics.median(seen)

    def base(self, layer: Layer) -> float:
        if 0 not in self.points[layer].get(0, {}):
            raise UserError(f"profile: has no base time of {layer.label} {layer.d_in}x{layer.d_out} "
                            f"on {self.conditions.device} with these kernels; run run_profile.py")
        return self.points[layer][0][0]

    def measured(self, layer: Layer, n_tb: int, k_chunk: int) -> bool:
        n_tb = n_tb if k_chunk else 0
        return k_chunk in self.points[layer].get(n_tb, {})

    def time(self, layer: Layer, n_tb: int, k_chunk: int) -> float:
        """Time at one point: measured, or between its measured neighbours."""
        base = self.base(layer)
        return base if k_chunk == 0 else float(interpolated(self.points[layer][n_tb], base)[k_chunk])

    def times(self) -> dict[Layer, dict[int, np.ndarray]]:
        """The tuner's table, one token's worth: ``[layer][n_tb][k_chunk]`` is the time of all ``layer.count``
        layers."""
        curves = {}
        for layer in {shape_of(layer): layer for layer in self.layers}.values():
            base = self.base(layer)
            curves[shape_of(layer)] = {n_tb: envelope(interpolated(points, base))
                                       for n_tb, points in sorted(self.points[layer].items()) if n_tb
                                       } or {1: np.array([base])}
        return {layer: {n_tb: layer.count * curve for n_tb, curve in curves[shape_of(layer)].items()}
                for layer in self.layers}


def interpolated(points: dict[int, float], base: float) -> np.ndarray:
    """Times at k_chunk 0, 1, ... up to the last measured one, linear between measured points.

    Entry 0 is ``base``. Nothing is assumed between it and the first measured point, where fixed costs set in: infinity
    there.
    """
    known = sorted(points)
    if not known:
        return np.array([base])
    curve = np.interp(np.arange(known[-1] + 1), known, [points[k] for k in known])
    curve[:known[0]] = np.inf
    curve[0] = base
    return curve


def envelope(curve: np.ndarray) -> np.ndarray:
    """The same times made non-falling from k_chunk 1 on: one that takes longer than a larger k_chunk counts as that one
    does.

    Noise, and row counts that divide badly among warps, make measured times fall here and there. Fetching more in less
    time is never worse, and both tuners climb such a step to its end, so that what they choose was really measured.
    """
    return np.concatenate([curve[:1], np.minimum.accumulate(curve[:0:-1])[::-1]])
