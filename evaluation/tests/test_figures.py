from pathlib import Path

import pytest

from decdec.files import append_row
from decdec.testing import refused, run_script

EVALUATION = Path(__file__).parents[1]


def row(method, k_chunk, perplexity, bits=3):
    return {"bench": "perplexity", "model": "m", "method": method, "bits": bits, "selection": "bucket" if k_chunk else "none",
            "k_chunk": k_chunk, "perplexity": perplexity, "device_bytes": 2_000_000, "host_bytes": 1_000_000, "text": "t",
            "windows": 1, "window_length": 8}


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    for content in (row("awq", 8, 25.25), row("awq", 0, 30.5), row("original", 0, 20.0, 16)):
        append_row(path, content)
    return path


def test_table_has_every_row_in_order(rows):
    lines = run_script(EVALUATION / "table.py", rows).stdout.splitlines()
    assert lines[0] == "m on t, 1 windows of 8 tokens"
    assert [line.split()[:5] for line in lines[3:]] == [["awq", "3", "none", "0", "30.50"], ["awq", "3", "bucket", "8", "25.25"],
                                                       ["original", "16", "none", "0", "20.00"]]


def test_figure_13_is_written_as_pdf_and_png(rows, tmp_path):
    result = run_script(EVALUATION / "figures/fig13_perplexity.py", rows, "--out", tmp_path / "figure.pdf")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", ["table.py", "figures/fig13_perplexity.py"])
def test_no_rows_is_one_line_and_no_file(tmp_path, script):
    out = ("--out", tmp_path / "figure.pdf") if "fig" in script else ()
    assert "rows" in refused(run_script(EVALUATION / script, tmp_path / "none.jsonl", *out))
    assert list(tmp_path.iterdir()) == []


def test_a_broken_row_is_named(rows):
    with open(rows, "a") as file:
        file.write('{"cut": \n')
    assert "line 4" in refused(run_script(EVALUATION / "table.py", rows))


def test_every_figure_script_explains_itself():
    for script in sorted((EVALUATION / "figures").glob("fig*.py")):
        assert "usage" in run_script(script, "--help").stdout
