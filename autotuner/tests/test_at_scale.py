from pathlib import Path

import pytest

from decdec.files import read_rows
from decdec.testing import run_script

SCRIPT = Path(__file__).parents[1] / "at_scale.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("scale") / "rows.jsonl"
    for _ in range(2):  # written anew, not appended
        result = run_script(SCRIPT, "--model", "llama-3-8b", "--gpu", "4050M", "4090", "--out", out)
        assert result.returncode == 0, result.stderr
    return {(row["gpu"], row["format"], row["residual_bits"]): row for row in read_rows(out)}, len(read_rows(out))


def test_every_prediction_is_there_once_and_marked(rows):
    found, count = rows
    assert len(found) == count == 2 * 2 * 4 and all(row["predicted"] is True for row in found.values())


def test_bytes_are_those_of_the_paper(rows):
    row = rows[0]["4050M", "uniform", 4]  # 6.979 B weights at half a byte; 3.41 MB a token and k_chunk
    assert row["host_bytes"] == pytest.approx(3.49e9, rel=1e-3)
    assert row["fetched_bytes"][row["k_chunk"].index(8)] == pytest.approx(8 * 3.41e6, rel=1e-2)


def test_half_the_bits_take_the_time_of_half_the_channels(rows):
    for gpu in ("4050M", "4090"):
        four, two = rows[0][gpu, "codebook", 4], rows[0][gpu, "codebook", 2]
        assert two["host_bytes"] * 2 == four["host_bytes"]
        for k in (8, 32, 64):
            assert two["ms_per_token"][two["k_chunk"].index(2 * k)] == four["ms_per_token"][four["k_chunk"].index(k)]
        assert four["ms_per_token"] == sorted(four["ms_per_token"])
