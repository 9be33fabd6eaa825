"""The values of n_tb worth trying (end of the paper's section 4.4)."""

from decdec.reference import CHUNK

SEGMENT = 256  # outputs of a residual row that a fetching block takes at once: 128 bytes at 4 bits


def n_tb_candidates(d_in: int, d_out: int) -> list[int]:
    """Candidates for a ``(d_out, d_in)`` layer, ascending.

    Selection gains from a block a chunk: every n up to ``d_in / 1024``. Fetching gains where a block's share of the
    ``d_out / 256`` segments shrinks: of all n that give the slowest block the same share, the smallest.
    """
    segments = -(-d_out // SEGMENT)
    selecting = set(range(1, d_in // CHUNK + 1))
    fetching = {n for n in range(1, segments + 1) if -(-segments // -(-segments // n)) == n}
    return sorted(selecting | fetching)


def largest_candidate(candidates: list[int], n_max: int) -> int | None:
    """The largest candidate that is at most ``n_max``; None if there is none."""
    return max((n for n in candidates if n <= n_max), default=None)
