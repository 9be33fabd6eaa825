"""The measurements behind Figures 4, 5 and 16 against their definitions, written out."""

from pathlib import Path

import pytest
import torch
from capture import layers_by_input
from error_curve import curve
from outliers import static_recall
from recall import found, recall, recall_of

from decdec import hub, models
from decdec.compensated import Compensation
from decdec.files import read_rows
from decdec.testing import add_repair, quick_folder, refused, run_script

EVALUATION = Path(__file__).parents[1]
SHORT = ("--text", "pydoc", "--length", 64)


def test_error_curve_is_what_is_left_after_restoring():
    torch.manual_seed(0)
    x, residual = torch.randn(3, 20), torch.randn(20, 7)
    orders = x.abs().argsort(dim=1, descending=True)
    counts = [0, 3, 11, 20]
    for count, value in zip(counts, curve(x, residual, orders, counts), strict=True):
        left = x.clone()
        for row, order in zip(left, orders, strict=True):
            row[order[:count]] = 0
        assert value == pytest.approx(float((left @ residual).square().mean()), rel=1e-5, abs=1e-12)


def test_static_recall_counts_the_common_channels():
    x = torch.tensor([[9.0, 1, -8, 2, 3, 0, 0, 0, 0, 0], [0, 9, 0, -8, 7, 0, 0, 0, 0, 0]])
    mean_square = torch.tensor([5.0, 4, 3, 2, 1, 0, 0, 0, 0, 0])
    assert static_recall(x, mean_square, 0.2) == [0.5, 0.5]  # top 2: {0, 2} and {1, 3} against {0, 1}


def test_recall_counts_found_channels_and_not_missing_ones():
    x = torch.tensor([[5.0, -4, 3, 2, 1, 0]])
    assert found(x, torch.tensor([[0, 1, 5]])).tolist() == pytest.approx([2 / 3])
    assert found(x, torch.tensor([[-1, -1, 0]])).tolist() == pytest.approx([1 / 3])


def test_recall_is_of_the_input_that_is_selected_from(original, tmp_path):
    folder = add_repair(quick_folder(models.load_model(str(original)), tmp_path / "quick"))
    model = hub.load(folder)
    ids = torch.arange(20, 60)
    hub.set_compensation(model, Compensation(8, "exact", prefill=True, repair=True))
    exact = recall(model, ids)
    assert exact["qkv"] == exact["o"] == 1  # of a single chunk the exact selection finds all, of centred inputs too
    layer = layers_by_input(model)[0, "o"][0]
    x = torch.zeros(3, layer.in_features)
    x[:, -2:] = 1
    hub.set_compensation(model, Compensation(8, "static", prefill=True, repair=True))
    layer.repair = None
    layer.static_channels = torch.tensor([0, 1], dtype=torch.int32)
    layer.order = torch.arange(layer.in_features - 1, -1, -1, dtype=torch.int32)  # so the packed first are the layer's last
    assert recall_of(layer, x) == 1


def test_recall_of_each_selection(everything):
    recall = {(row["selection"], row["k_chunk"]): row["recall"] for row in read_rows(everything / "recall.jsonl")}
    assert recall["exact", 32] > recall["bucket", 32] > recall["static", 32] > 0
    assert recall["random", 32] == pytest.approx(32 / 1024, abs=0.02)
    assert recall["exact", 32] > 0.95  # not 1: the wide layer's truth is over its whole input, the selection's in chunks


def test_error_curves_fall_to_nothing_and_order_matters(everything):
    rows = read_rows(everything / "error_curve.jsonl")
    assert {row["order"] for row in rows} == {"sorted", "random"} and {row["residual_bits"] for row in rows} == {16}
    for row in rows:
        assert row["mse"][-1] == 0 and row["mse"][0] > 0 and row["restored"][-1] == row["d_in"]
    quarter = {order: sum(row["mse"][8] / row["mse"][0] for row in rows if row["order"] == order) for order in ("sorted", "random")}
    assert quarter["sorted"] < 0.6 * quarter["random"]


@pytest.mark.parametrize(("script", "arguments", "message"), [
    ("error_curve.py", (), "--cheatsheet: expected exact residuals"),
    ("error_curve.py", ("--positions", 64), "--positions: expected 1 up to --length 64, got 64"),
    ("recall.py", ("--k-chunk", 2000), "--k-chunk: expected 0..1024, got 2000"),
])
def test_bad_input_ends_in_one_line(folder, tmp_path, script, arguments, message):
    result = run_script(EVALUATION / script, "--model", folder, *SHORT, *arguments, "--out", tmp_path / "rows.jsonl")
    assert message in refused(result) and not list(tmp_path.iterdir())


def test_an_original_model_has_no_residuals(original, tmp_path):
    assert "expected a DecDEC folder" in refused(run_script(EVALUATION / "recall.py", "--model", original, *SHORT))
