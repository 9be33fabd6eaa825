"""What the benchmarks' scripts refuse, and the figure of their rows, without a GPU."""

import importlib.util
import sys
from pathlib import Path

import pytest

from decdec import figure_style
from decdec.errors import UserError
from decdec.files import append_row

ROOM = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """``script(name, *arguments)``: the script as a module, with these arguments."""

    def load(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOM / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("arguments, message", [
    (["--n-tb", 8, 0], "--n-tb: expected positive numbers, got 0"),
    (["--batch", 0], "--batch: expected positive numbers, got 0"),
    (["--sms", -1], "--sms: expected positive numbers, got -1"),
    (["--k-chunk", 8, 2000], "--k-chunk: expected 1 to 1024 with these residuals, got 2000"),
    (["--k-chunk", 0], "--k-chunk: expected 1 to 1024"),
    (["--k-chunk", 512, "--nested", 2, 1], "--k-chunk: expected 1 to 256 with these residuals, got 512"),
])
def test_arguments_that_no_kernel_takes(script, arguments, message):
    with pytest.raises(UserError, match=message):
        script("kernels", *arguments).parse()


def test_arguments_at_their_bounds(script):
    assert script("kernels", "--k-chunk", 1, 256, "--nested", 1, "--batch", 9, "--n-tb", 1).parse().batch == 9


@pytest.fixture
def rows(tmp_path):
    """Rows of two GPUs, with eight n_tb of one, and a later one that replaces the first of these."""
    path = tmp_path / "rows.jsonl"
    common = dict(d_in=4096, d_out=28672, format="codebook", bits=3, sms=132, batch=1)
    for device, base in (("A", 10.0), ("B", 20.0)):
        append_row(path, common | dict(bench="base", us=base, k_chunk=0, n_tb=0, device=device))
        for n_tb in range(1, 9 if device == "A" else 2):
            append_row(path, common | dict(bench="compensated", us=base * (1 + n_tb), k_chunk=8, n_tb=n_tb, device=device))
    append_row(path, common | dict(bench="compensated", us=15.0, k_chunk=8, n_tb=1, device="A"))
    return path


def test_the_figure_of_one_gpu(script, rows, tmp_path, monkeypatch):
    drawn = []
    save = figure_style.plt.Figure.savefig
    monkeypatch.setattr(figure_style.plt.Figure, "savefig",
                        lambda figure, *args, **kwargs: drawn.append(figure.axes[0]) or save(figure, *args, **kwargs))
    script("figure", rows, "--out", tmp_path / "figure", "--device", "A").main()
    lines = drawn[0].get_lines()
    assert [list(line.get_ydata()) for line in lines] == [[1.0, 1.5], *([1.0, 1.0 + n_tb] for n_tb in range(2, 9))]
    assert "A, 132 SMs" in drawn[0].get_title() and (tmp_path / "figure.pdf").is_file() and (tmp_path / "figure.png").is_file()


def test_rows_of_several_gpus_are_not_mixed(script, rows, tmp_path):
    with pytest.raises(UserError, match="--device: expected one of A, B"):
        script("figure", rows, "--out", tmp_path / "figure").main()
    with pytest.raises(UserError, match="found none"):
        script("figure", rows, "--out", tmp_path / "figure", "--device", "C").main()
