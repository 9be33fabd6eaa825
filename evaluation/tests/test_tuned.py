"""Rows of plans whose blocks differ, and which folders the paper looks closer at."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from narrowest import mean_bits
from tuned import by_kind, token_ms

from decdec.files import append_row
from decdec.plan import Choice, Tuned
from decdec.testing import refused, run_script

EVALUATION = Path(__file__).parents[1]


def choice(kind, k_chunk, block=None, predicted=3.0):
    return Choice(kind, 3, 64, 64, 1, 4, k_chunk, 2.0, predicted, block=block)


def tuned(*choices):
    return Tuned(5, "kernel", "quality by block", 4.0, None, 1000.0, None, choices)


def test_blocks_that_differ_are_told_apart_and_others_are_not(tmp_path):
    plan = tuned(choice("o", 8, 0), choice("o", 8, 1), choice("d", 0, 0), choice("d", 90, 1, 5.0))
    assert by_kind(plan, "k_chunk") == {"o3": 8, "d3": [0, 90]}
    assert token_ms(plan, True) == (3 + 3 + 3 + 5 + 1000) / 1000 and token_ms(plan, False) == (4 * 2 + 1000) / 1000
    in_runtime = replace(plan, scope="end-to-end", measured_percent=10.0)  # what a runtime measured counts, not what kernels add up to
    assert token_ms(in_runtime, True) == pytest.approx(1.1 * token_ms(plan, False))
    append_row(tmp_path / "rows", {"bench": "tuned", "model": "m", "method": "awq", "bits": 3, "gpu": "4090", "timing": "simulated",
                                   "scope": "kernel", "target_percent": 5, "predicted_percent": 4.0, "measured_percent": None,
                                   "k_chunk": by_kind(plan, "k_chunk"), "n_tb": by_kind(plan, "n_tb")})
    table = run_script(EVALUATION / "figures/table3_tuner.py", tmp_path / "rows").stdout
    assert table.splitlines()[-1] == "| 4090 | simulated | 5 % kernel | 4/(8, 0-90) 4.0 % |"


def test_the_folders_of_fewest_bits(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    for name, change in (("w4", {"bits": 4}), ("w3.5", {"layer_bits": {"model.layers.0.mlp.down_proj": 4}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | change}))
    assert [mean_bits(path) for path in (folder, tmp_path / "w3.5", tmp_path / "w4")] == [3, 3.5, 4]
    result = run_script(EVALUATION / "narrowest.py", tmp_path / "w4", folder, tmp_path / "w3.5", folder)
    assert result.stdout.splitlines() == [str(folder), str(folder)]


def test_the_folders_own_plan_is_taken(folder):
    assert "plan.json" in refused(run_script(EVALUATION / "tuned.py", "--model", folder, "--text", "pydoc"))
