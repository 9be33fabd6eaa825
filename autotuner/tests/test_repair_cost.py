"""The time of a static repair: counted wherever a layer is compensated, and taken along by the plan."""

import json

import analytic
import pytest
import run_profile
import shapes
import torch
import tuner
from shapes import Layer

from decdec import hub, plan
from decdec.artifacts import REPAIR, load_repair, read_quant_config
from decdec.errors import UserError
from decdec.models import load_model
from decdec.testing import add_repair, quick_folder
from decdec.tiny import make_model

RATES = analytic.Rates(dram_gb_s=200.0, link_gb_s=16.0, sms=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("repair")
    return add_repair(quick_folder(load_model(str(make_model(path / "original")), torch.float32), path / "quick"))


def test_it_takes_its_bytes_and_two_small_products():
    plain, repaired = (Layer("o", 3, 4096, 4096, 32, repair_rank=rank) for rank in (0, 8))
    assert repaired.repair_bytes == 2 * 8 * 8192
    added = analytic.compensated_us(repaired, 8, 16, RATES) - analytic.compensated_us(plain, 8, 16, RATES)
    assert added == pytest.approx(2 * RATES.small_us + 2 * 8 * 8192 / 200e3)
    assert analytic.compensated_us(repaired, 0, 0, RATES) == analytic.compensated_us(plain, 0, 0, RATES)  # not there without


def test_fused_layers_add_their_ranks(folder):
    found = {layer.kind: layer.repair_rank for layer in shapes.from_folder(folder, repair=True).layers}
    assert found == {"qkv": 6, "o": 3, "gu": 6, "d": 3}  # k_proj has no rank
    assert len(load_repair(folder / REPAIR, read_quant_config(folder)).layers) == 14  # but a mean
    assert not any(layer.repair_rank for layer in shapes.from_folder(folder).layers)


def test_a_plan_takes_it_along(call, folder, tmp_path):
    profile, out = tmp_path / "rows.jsonl", tmp_path / "plan.json"
    where = (folder, "--simulate", "4050M", "--profile", profile, "--repair")
    call(run_profile, *where)
    call(tuner, *where, "--objective", "paper", "--target", 900, "--out", out)
    made = plan.load_plan(out)
    assert made.repair and any(choice.k_chunk for choice in made.tuned[0].choices)
    assert {row["repair_rank"] for row in map(json.loads, profile.read_text().splitlines()) if row["what"] == "timing"} == {3, 6}
    model = hub.load(folder)
    plan.apply(made, model)
    for layer in hub.compensated_layers(model).values():
        assert layer.compensation.repair == (layer.compensation.k_chunk > 0)
    old = json.loads(out.read_text())
    del old["repair"]
    out.write_text(json.dumps(old))
    assert not plan.load_plan(out).repair
    with pytest.raises(UserError, match="repair: expected a model folder"):
        call(run_profile, "--random-weights", "llama-3-8b", *where[1:])
