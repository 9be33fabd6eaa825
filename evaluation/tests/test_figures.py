import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from fig14_bbh import accuracies
from series import by_k_chunk
from subject import SUBJECT_KEY

from decdec.files import append_row, read_rows
from decdec.testing import refused, run_script

EVALUATION = Path(__file__).parents[1]
FIGURES = sorted((EVALUATION / "figures").glob("fig*.py"))
TABLES = sorted((EVALUATION / "figures").glob("table*.py"))
PICTURES = [script.stem for script in FIGURES] + ["fig18_tuned"]


def row(method, k_chunk, perplexity, bits=3, **other):
    return {"bench": "perplexity", "model": "m", "method": method, "bits": bits, "selection": "bucket" if k_chunk else "none",
            "k_chunk": k_chunk, "perplexity": perplexity, "device_bytes": 2_000_000, "host_bytes": 1_000_000, "text": "t",
            "text_hash": "h", "windows": 1, "window_length": 8, "residual_bits": 4 if k_chunk else None, "nested": False,
            "dtype": "float32"} | other


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


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_one_column_wide_with_its_fonts(everything, name):
    pdf = (everything / f"{name}.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"/FontFile2" in pdf and b"/Type3" not in pdf
    with Image.open(everything / f"{name}.png") as picture:
        assert picture.width == 999 and picture.info["dpi"][0] == pytest.approx(300, abs=0.1)


def test_the_report_has_every_picture_and_table(everything):
    report = (everything / "REPORT.md").read_text()
    assert "Not made yet" not in report
    shown = re.findall(r"!\[[^]]*\]\((.*?)\)", report)
    assert sorted(shown) == sorted(f"{name}.png" for name in PICTURES)
    assert (everything / "table2.md").read_text().strip() in report and (everything / "table3.md").read_text().strip() in report


def test_no_row_is_written_twice(everything):
    extra = ("block", "kind", "order", "task", "metric", "filter", "gpu", "target_percent", "model_id")
    for path in [*everything.glob("*.jsonl"), everything.with_name(f"{everything.name}.jsonl")]:
        counts = Counter(tuple(str(content.get(name)) for name in (*SUBJECT_KEY, *extra)) for content in read_rows(path))
        assert counts and max(counts.values()) == 1, path


def test_rows_say_what_was_compensated(everything):
    said = {(content["task"], content["k_chunk"]): content["compensated"] for content in read_rows(everything / "lm_tasks.jsonl")}
    assert said["bbh_cot_fewshot_navigate", 0] == "none" and said["bbh_cot_fewshot_navigate", 16] == "generated tokens"
    perplexities = read_rows(everything.with_name(f"{everything.name}.jsonl"))
    assert {(content["k_chunk"] > 0, content["compensated"]) for content in perplexities} == {(False, "none"), (True, "every position")}


def test_table_2_compares_equal_traffic(tmp_path):
    path = tmp_path / "rows.jsonl"
    for bits, k_chunk, value in ((4, 8, 25.0), (2, 16, 26.0), (8, 4, 24.5), (4, 16, 23.0), (2, 32, 22.0)):
        append_row(path, row("awq", k_chunk, value, residual_bits=bits))
    append_row(path, row("awq", 0, 30.0))
    lines = run_script(EVALUATION / "figures/table2_residual_bits.py", path).stdout.splitlines()
    assert lines[0] == "AWQ, 3 bits: perplexity 30.00 without compensation"
    assert lines[4:] == ["| 8 | 26.00 (k 16) | 25.00 (k 8) | **24.50** (k 4) | - |", "| 16 | **22.00** (k 32) | 23.00 (k 16) | - | - |"]


def test_figure_14_averages_the_subtasks_that_all_have(tmp_path):
    path = tmp_path / "rows.jsonl"
    for k_chunk, task, value in ((0, "a", 0.1), (0, "b", 0.3), (8, "a", 0.2)):
        append_row(path, row("awq", k_chunk, None) | {"bench": "lm_eval", "task": f"bbh_cot_fewshot_{task}", "metric": "exact_match",
                                                      "compensated": "generated tokens" if k_chunk else "none", "value": value,
                                                      "limit": None, "max_gen_toks": None, "weights_hash": "w", "seed": 0})
    result = run_script(EVALUATION / "figures/fig14_bbh.py", path, "--out", tmp_path / "figure")
    assert result.returncode == 0, result.stderr
    drawn = (tmp_path / "figure.pdf").stat().st_size
    append_row(path, read_rows(path)[-1] | {"task": "bbh_cot_fewshot_b", "value": 0.9})
    assert run_script(EVALUATION / "figures/fig14_bbh.py", path, "--out", tmp_path / "figure").returncode == 0
    assert (tmp_path / "figure.pdf").stat().st_size != drawn


def test_rows_of_other_texts_are_left_out_and_said_to_be(rows, tmp_path):
    append_row(rows, row("awq", 8, 33.0, text_hash="other"))
    result = run_script(EVALUATION / "figures/fig13_perplexity.py", rows, "--out", tmp_path / "figure")
    assert result.returncode == 0 and "3 rows of other" in result.stderr


@pytest.mark.parametrize("script", ["table.py", *(f"figures/{script.name}" for script in FIGURES + TABLES)])
def test_no_rows_is_one_line_and_no_file(tmp_path, script):
    out = () if script == "table.py" else ("--out", tmp_path / "figure.pdf")
    assert "rows" in refused(run_script(EVALUATION / script, tmp_path / "none.jsonl", *out))
    assert list(tmp_path.iterdir()) == []


def series_of(*rows):
    return by_k_chunk(rows, "perplexity", "bucket")


def test_lines_hold_one_model_each_and_average_nothing_but_seeds():
    old = [row("awq", k, 90.0, weights_hash="old", seed=0) for k in (0, 8)]
    new = [row("awq", k, value, weights_hash="new", seed=seed) for k, seed, value in ((0, 0, 30.0), (8, 0, 24.0), (8, 1, 26.0))]
    again = row("awq", 8, 22.0, weights_hash="new", seed=0)  # measured once more, with other thresholds
    repaired = [row("awq", k, value, weights_hash="new", repair="r", seed=0) for k, value in ((0, 27.0), (8, 21.0))]
    assert series_of(*old, *new, again, *repaired) == ({"AWQ, 3 bits": {0: 30.0, 8: 24.0}, "AWQ, 3 bits, repaired": {0: 27.0, 8: 21.0}},
                                                       None)
    assert series_of(*new, *old)[0] == {"AWQ, 3 bits": {0: 90.0, 8: 90.0}}
    nested = row("awq", 8, 20.0, weights_hash="new", nested=True, residual_bits=2, seed=0)
    assert series_of(new[0], nested, row("original", 0, 9.0, 16)) == ({"AWQ, 3 bits, nested 2": {0: 30.0, 8: 20.0}}, 9.0)


def test_rows_left_out_are_counted_and_originals_without_a_hash_stay(capsys):
    originals = [row("original", 0, value, 16, weights_hash=weights) for value, weights in ((9.0, None), (8.0, "w"), (7.0, None))]
    for seed, original in enumerate(originals):
        original["seed"] = seed
    assert series_of(*originals)[1] == pytest.approx(8.0) and not capsys.readouterr().err
    series_of(row("awq", 0, 90.0, weights_hash="old"), *(row("awq", k, 30.0, weights_hash="new") for k in (0, 8)))
    assert capsys.readouterr().err == "1 rows of older weights or repairs are left out\n"
    tasks = [original | {"task": task, "value": 0.1} for original, task in zip(originals, "aba", strict=True)]
    assert accuracies([task | {"seed": 0} for task in tasks])[1] == 2  # those measured before and after are one setting's


def test_every_group_size_has_a_line_and_is_told_where_there_are_several(tmp_path):
    sizes = [row("awq", k, 30.0 - k, weights_hash=str(size), group_size=size) for size in (64, 128) for k in (0, 8)]
    assert series_of(*sizes)[0] == {f"AWQ, 3 bits, groups of {size}": {0: 30.0, 8: 22.0} for size in (128, 64)}
    assert set(series_of(*sizes[2:])[0]) == {"AWQ, 3 bits"}
    path = tmp_path / "rows.jsonl"
    for content in sizes:
        append_row(path, content, content | {"residual_bits": 2, "k_chunk": 2 * content["k_chunk"]})
    lines = run_script(EVALUATION / "figures/table2_residual_bits.py", path).stdout.splitlines()
    assert [line.split(":")[0] for line in lines if ":" in line] == [f"AWQ, 3 bits, groups of {size}" for size in (128, 64)]


def test_a_repair_is_told_in_the_table_and_in_figure_14(rows, tmp_path):
    append_row(rows, row("awq", 8, 21.0, repair="r", repair_settings={"rank": 4, "center": "on", "k_chunk": 16}))
    lines = run_script(EVALUATION / "table.py", rows).stdout.splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[1:]] == ["repair", "-" * 17, "-", "-", "rank 4, center on", "-"]
    task = {"task": "bbh_a", "value": 0.1}
    plain, repaired = row("awq", 8, None) | task, row("awq", 8, None, repair="r") | task | {"value": 0.3}
    assert [round(mean["accuracy"]) for mean in accuracies([plain, repaired])[0]] == [10, 30]


def test_figure_16_takes_the_bits_and_the_residuals_that_were_measured(tmp_path):
    path = tmp_path / "rows.jsonl"
    for selection, value in (("bucket", 24.0), ("static", 26.0)):
        measured = row("rtn", 8, value, 4, selection=selection, nested=True, residual_bits=2)
        append_row(path, measured, measured | {"bench": "recall", "recall": 0.8})
    append_row(path, row("rtn", 0, 30.0, 4))
    result = run_script(EVALUATION / "figures/fig16_selection.py", path, "--out", tmp_path / "figure")
    assert result.returncode == 0, result.stderr


def test_figure_4_is_drawn_of_several_seeds_and_of_what_an_interrupt_left(tmp_path):
    path = tmp_path / "rows.jsonl"
    for kind in ("qkv", "o", "gu", "d"):
        for order, seed in (("sorted", 0), ("random", 0), ("random", 1)):
            if (kind, order) != ("d", "random"):
                append_row(path, row("awq", 0, None) | {"bench": "error_curve", "block": 0, "kind": kind, "order": order, "seed": seed,
                                                        "positions": 1, "d_in": 8, "restored": [0, 4, 8], "mse": [1, 0.5, 0],
                                                        "magnitude": [1, 0.5, 0.1]})
    result = run_script(EVALUATION / "figures/fig04_error_curve.py", path, "--out", tmp_path / "figure")
    assert result.returncode == 0, result.stderr


def test_a_broken_row_is_named(rows):
    with open(rows, "a") as file:
        file.write('{"cut": \n')
    assert "line 4" in refused(run_script(EVALUATION / "table.py", rows))
