import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import analytic
import export_csv
import few_sms
import fig12_normalised_time
import measure_gains
import pytest
import run_profile
import simulated
import table3
import torch
import tuner
from datasheet import Sheet
from gains import DERIVED, GAINS, MEASURED, NORMAL, _derived, diminishing, of_normal_inputs, read_gains, sheet_identity
from measure_gains import at_k_chunk, removed_by_rank
from profiling import coarse_points
from safetensors.torch import save_file
from session import Session, rates_row
from shapes import from_folder, random_weights
from timings import Conditions, Timings, timing_row

from decdec import hub
from decdec.artifacts import Thresholds, load_cheatsheet, read_quant_config, save_cheatsheet
from decdec.errors import UserError
from decdec.files import append_row, open_safetensors, read_rows
from decdec.linear import Compensation
from decdec.models import block_of
from decdec.plan import Device, apply, load_plan
from decdec.testing import refused, run_script

ROOM = Path(__file__).parents[1]
LAYERS = random_weights("llama-3-8b", 3, "codebook").layers
RANDOM = ("--random-weights", "llama-3-8b", "--simulate", "4050M")


@pytest.fixture(scope="session")
def profile(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "rows.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run_profile.py", *RANDOM, "--profile", str(path)])
        run_profile.main()
    return path


def test_simulated_targets_give_a_plan_near_the_papers_table_3(call, profile, tmp_path):
    """4050M, 3-bit Llama-3-8B at 2.5 %: the paper chose (55,56,58,55)."""
    printed = call(tuner, *RANDOM, "--profile", profile, "--out", tmp_path / "plan.json", "--target", 2.5, 20,
                   "--rows", tmp_path / "rows.jsonl")
    plan = load_plan(tmp_path / "plan.json")
    assert plan.device == Device("4050M", 20, simulated=True) and plan.at().measured_percent is None
    assert [tuned.target_percent for tuned in plan.tuned] == [2.5, 20]
    assert all(0 < tuned.predicted_percent <= tuned.target_percent for tuned in plan.tuned)
    assert all(abs(choice.k_chunk - paper) <= 5 for choice, paper in zip(plan.at().choices, (55, 56, 58, 55)))
    assert "SIMULATED" in printed and len(read_rows(tmp_path / "rows.jsonl")) == 8


def test_saved_rows_alone_give_the_same_plan(call, profile, tmp_path):
    for name, device in (("here", ("--simulate", "4050M")), ("saved", ("--saved",))):
        call(tuner, "--random-weights", "llama-3-8b", *device, "--profile", profile, "--out", tmp_path / name)
    assert (tmp_path / "here").read_text() == (tmp_path / "saved").read_text()


def test_an_end_to_end_target_allows_more(call, profile, tmp_path):
    chosen = {}
    for scope in ("kernel", "end-to-end"):
        call(tuner, *RANDOM, "--profile", profile, "--out", tmp_path / scope, "--scope", scope)
        chosen[scope] = load_plan(tmp_path / scope).at()
    assert sum(c.k_chunk for c in chosen["end-to-end"].choices) > sum(c.k_chunk for c in chosen["kernel"].choices)
    assert chosen["end-to-end"].predicted_percent <= 5


FAKE_RUNTIME = """
import json, sys
for line in sys.stdin:
    question = json.loads(line)
    answer = {"base_ms": 40.0}
    if question:
        chosen = json.load(open(question["plan"]))["tuned"][0]
        assert chosen["target_percent"] == question["target"]
        added = sum(c["count"] * (FACTOR * (c["predicted_us"] - c["base_us"]) + (EXPOSED if c["kind"] == "o" else 0))
                    for c in chosen["choices"] if c["k_chunk"]) / 1000
        answer["ms"] = 40.0 + added
    print(json.dumps(answer), flush=True)
"""


def test_a_runtime_tells_what_a_token_takes_under_a_kernel_target(call, profile, tmp_path):
    (tmp_path / "runtime.py").write_text(FAKE_RUNTIME.replace("FACTOR", "0.5").replace("EXPOSED", "0"))
    printed = call(tuner, *RANDOM, "--profile", profile, "--out", tmp_path / "plan", "--target", 10,
                   "--timer", f"{sys.executable} {tmp_path / 'runtime.py'}")
    tuned = load_plan(tmp_path / "plan").at()
    added = sum(c.count * (c.predicted_us - c.base_us) for c in tuned.choices) / 1000
    assert added > 0 and tuned.token_percent == pytest.approx(100 * 0.5 * added / 40)
    assert f"a token {tuned.token_percent:.1f}%" in printed and ", a token " in call(table3, tmp_path / "plan")


@pytest.mark.parametrize("factor, exposed", [(0.6, 0), (1.0, 0), (1.7, 0), (1.0, 12), (0.8, 30)])
def test_a_runtime_has_the_last_word_on_end_to_end_targets(call, profile, tmp_path, factor, exposed):
    """One in which compensation takes ``factor`` of the time that the kernels' times say, and o ``exposed`` us more."""
    (tmp_path / "runtime.py").write_text(FAKE_RUNTIME.replace("FACTOR", str(factor)).replace("EXPOSED", str(exposed)))
    call(tuner, *RANDOM, "--profile", profile, "--out", tmp_path / "plan", "--scope", "end-to-end", "--target", 5, 20,
         "--timer", f"{sys.executable} {tmp_path / 'runtime.py'}")
    for tuned in load_plan(tmp_path / "plan").tuned:
        added = sum(c.count * (factor * (c.predicted_us - c.base_us) + (exposed if c.kind == "o" else 0))
                    for c in tuned.choices if c.k_chunk) / 1000
        assert tuned.measured_percent == pytest.approx(100 * added / 40)
        assert 0.8 * tuned.target_percent < tuned.measured_percent <= tuned.target_percent
        assert abs(tuned.predicted_percent - tuned.measured_percent) <= 0.5
        assert tuned.rest_us == pytest.approx(40_000 - sum(c.count * c.base_us for c in tuned.choices))


def test_figure_table_and_csv_from_the_rows(call, profile, tmp_path):
    call(tuner, *RANDOM, "--profile", profile, "--out", tmp_path / "plan.json")
    call(fig12_normalised_time, *RANDOM, "--profile", profile, "--out", tmp_path / "figures")
    assert (tmp_path / "figures" / "fig12_gu_w3.pdf").read_bytes().startswith(b"%PDF")
    table = call(table3, tmp_path / "plan.json")
    assert "| 4050M 20 SMs (simulated) | 5% |" in table and "predicted" in table
    lines = call(export_csv, profile, "--what", "timing").splitlines()
    assert "k_chunk,us,spread" in lines[0] and len(lines) > 100


def test_few_sms_beside_many(call, profile, tmp_path):
    """A profile of two parts of one GPU: fewer SMs have a slower base GEMV, which hides more."""
    with pytest.raises(UserError, match="expected rows of 2 to 6 SM counts, got 20"):
        call(few_sms, *RANDOM[:2], "--profile", profile, "--out", tmp_path)
    of_sms = {}
    for sms, dram in ((24, 500.0), (80, 2000.0)):
        session = Session(Device("big", sms), Conditions("big", sms, "lib", "float16", "exact"),
                          analytic.Rates(dram, 50.0, sms), None, {})
        append_row(tmp_path / "rows", rates_row(session))
        of_sms[sms] = Timings(LAYERS, session.conditions)
        for layer in LAYERS:
            for n_tb, k_chunk in ((0, 0), *coarse_points(layer, 20.0, dram, 50.0, sms // 2)):
                us = analytic.compensated_us(layer, n_tb, k_chunk, session.rates)
                append_row(tmp_path / "rows", timing_row(session.conditions, layer, n_tb, k_chunk, us, 0.0, 31))
                of_sms[sms].add(layer, n_tb, k_chunk, us)
    printed = call(few_sms, *RANDOM[:2], "--profile", tmp_path / "rows", "--out", tmp_path)
    assert (tmp_path / "few_sms_gu_w3.pdf").read_bytes().startswith(b"%PDF") and printed.count("wrote") == 4
    few, many = (few_sms.normalised(of_sms[sms], LAYERS[2]) for sms in (24, 80))
    assert few[0] == many[0] == 1 and few[20] < 1.2 < many[20]


def test_the_whole_stage_on_a_folder_and_its_plan_is_refused_elsewhere(call, folder, tmp_path):
    settings = {"PYTHON": sys.executable, "SIMULATE": "4050M", "TEXT": "pydoc", "SAMPLES": "2", "SCOPE": "end-to-end",
                "RESULTS": str(tmp_path)}
    result = run_script(ROOM / "tune.sh", folder, 200, env=os.environ | settings)
    assert result.returncode == 0, result.stderr
    quant = read_quant_config(folder)
    plan = load_plan(folder / "plan.json", quant)
    assert plan.gain_source == MEASURED and plan.at().objective == "quality" and plan.at().scope == "end-to-end"
    assert any(choice.k_chunk for choice in plan.at().choices)
    model = hub.load(folder)
    apply(plan, model, prefill=True)
    for layer in hub.compensated_layers(model).values():
        choice = plan.at().choice(layer.kind, layer.bits)
        assert layer.compensation == Compensation(choice.k_chunk, "exact", prefill=True, n_tb=choice.n_tb)
    with pytest.raises(UserError, match="tuned for 200 %, not for 5 %"):
        apply(plan, model, 5)
    with pytest.raises(UserError, match="tuned for a simulated 4050M with 20 SMs, but this is H100 with 132 SMs"):
        load_plan(folder / "plan.json", quant, Device("H100", 132))
    content = json.loads((folder / "plan.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(content | {"weights_hash": "feed"}))
    with pytest.raises(UserError, match="tuned for weights feed"):
        load_plan(tmp_path / "other.json", quant)
    (tmp_path / "broken.json").write_text(json.dumps({k: v for k, v in content.items() if k != "device"}))
    with pytest.raises(UserError, match="cannot be read"):
        load_plan(tmp_path / "broken.json")
    assert "is there already" in call(measure_gains, folder, "--text", "pydoc", "--samples", 2)


def test_gains_of_other_residuals_are_not_taken(call, folder, tmp_path):
    for file in folder.iterdir():
        if file.name not in ("cheatsheet.pt", GAINS):
            (tmp_path / file.name).symlink_to(file)
    quant = read_quant_config(folder)
    sheet = load_cheatsheet(folder / "cheatsheet.pt", quant)
    measured = (measure_gains, tmp_path, "--text", "pydoc", "--samples", 1, "--length", 32)
    for changed in (sheet, replace(sheet, scale={name: 2 * scale for name, scale in sheet.scale.items()}),
                    replace(sheet, bits=2, nested=True)):
        save_cheatsheet(tmp_path / "cheatsheet.pt", changed, quant)
        if (tmp_path / GAINS).exists():
            with pytest.raises(UserError, match="measured for other residuals"):
                read_gains(tmp_path, from_folder(folder).layers)
            with open_safetensors(tmp_path / GAINS) as file:  # as one of an older version, which did not tell
                save_file({name: file.get_tensor(name) for name in file.keys()}, tmp_path / "older",
                          {key: value for key, value in file.metadata().items() if key != "sheet"})
            (tmp_path / "older").replace(tmp_path / GAINS)
            assert read_gains(tmp_path, from_folder(folder).layers)[1] == MEASURED
        if not changed.nested:  # whose rows would have to be others too
            assert "wrote" in call(*measured) and "is there already" in call(*measured)
            assert read_gains(tmp_path, from_folder(folder).layers)[1] == MEASURED


def test_layers_that_an_import_left_dense_are_not_tuned(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["dense"] = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert {layer.kind: layer.count for layer in from_folder(tmp_path).layers} == {"qkv": 2, "o": 2, "gu": 1, "d": 1}


def test_each_block_by_itself(call, folder, tmp_path):
    """Blocks whose channels are worth more get more; the plan reaches each block's layers."""
    gains = {name: torch.linspace(0, 1, 1025) * (1 if ".0." in name else 100)
             for name in hub.compensated_layers(hub.load(folder))}
    quant = read_quant_config(folder)
    sheet = sheet_identity(load_cheatsheet(folder / "cheatsheet.pt", quant))
    save_file(gains, tmp_path / GAINS, {"weights_hash": quant.weights_hash, "sheet": sheet})
    for file in ("config.json", "model.safetensors", "cheatsheet.pt", "thresholds.pt"):
        (tmp_path / file).symlink_to(folder / file)
    simulated = (tmp_path, "--simulate", "4050M", "--law", "--profile", tmp_path / "rows")
    call(run_profile, *simulated)
    printed = call(tuner, *simulated, "--each-block", "--target", 50)
    plan = load_plan(tmp_path / "plan.json")
    chosen = {(choice.kind, choice.block): choice.k_chunk for choice in plan.at().choices}
    assert plan.at().objective == "quality by block" and "by block" in printed and plan.at().predicted_percent <= 50
    assert all(chosen[kind, 1] >= chosen[kind, 0] for kind in ("qkv", "o", "gu", "d"))
    assert sum(k for (_, block), k in chosen.items() if block) > sum(k for (_, block), k in chosen.items() if not block)
    model = hub.load(folder)
    apply(plan, model)
    for layer in hub.compensated_layers(model).values():
        assert layer.compensation.k_chunk == chosen[layer.kind, block_of(layer.name)]


def test_without_calibration_data_quality_is_refused(call, folder, tmp_path):
    for file in ("config.json", "model.safetensors", "cheatsheet.pt"):
        (tmp_path / file).symlink_to(folder / file)
    simulated = (tmp_path, "--simulate", "4050M", "--profile", tmp_path / "rows")
    call(run_profile, *simulated)
    for asked in (("--each-block",), ("--objective", "quality")):
        with pytest.raises(UserError, match="quality needs calibration data"):
            call(tuner, *simulated, *asked)


def test_blocks_of_random_weights_use_up_what_kinds_leave(call, profile, tmp_path):
    """All blocks together cost too much or leave room; one more or less is finer than half a point."""
    chosen = {}
    for objective in ("--each-block",), ("--objective", "quality"), ("--objective", "paper"):
        call(tuner, *RANDOM, "--profile", profile, "--out", tmp_path / "plan", "--target", 20, "--scope", "end-to-end",
             *objective, "--rows", tmp_path / "rows.jsonl")
        chosen[objective[-1]] = load_plan(tmp_path / "plan")
    blocks, kinds, papers = (plan.at() for plan in chosen.values())
    assert chosen["quality"].gain_source == NORMAL and 19.5 < blocks.predicted_percent <= 20
    assert blocks.gain > 0.999 * kinds.gain > 0 and papers.gain is None  # fronts of many classes are thinned
    assert len(blocks.choices) == 32 * len(kinds.choices) == 32 * 4
    rows = read_rows(tmp_path / "rows.jsonl")
    for objective in {row["objective"] for row in rows}:
        assert sum(row["count"] for row in rows if row["objective"] == objective) == 32 * 4


def test_gains_without_gradients_come_from_thresholds(folder):
    layers = from_folder(folder).layers
    kept = (folder / GAINS).read_bytes() if (folder / GAINS).exists() else None
    (folder / GAINS).unlink(missing_ok=True)
    gains, unit = read_gains(folder, layers)
    assert unit == DERIVED
    for gain in gains.values():
        assert gain[0] == 0 and gain[1] > 0 and bool((gain.diff() >= 0).all()) and gain[-1] > 0.01
    if kept:
        (folder / GAINS).write_bytes(kept)


def test_gains_of_thresholds_by_hand():
    """Of energy 10 the largest |x| are taken to carry 6.4, 1.6, 1.6 and 0.4, each on a row of energy 1.7; of an output of 100."""
    seen = Thresholds({}, {"a": torch.tensor([4.0, 2, 2, 1])}, {"a": torch.tensor([1.0, 2, 3, 4])},
                      {"a": torch.tensor([1.0, 1, 2, 2])}, {"a": torch.tensor(100.0)})
    assert _derived(seen)["a"][[0, 256, 512, 1024]].tolist() == pytest.approx([0, 0.064 * 1.7, 0.08 * 1.7, 0.1 * 1.7])


def test_one_channel_removes_half_of_its_slope():
    by_rank, = removed_by_rank(torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]]))
    assert by_rank.tolist() == [7.5, -1]  # -1/2 x_c g.R_c, the larger |x| first


def test_a_simulated_gpu_reaches_its_shares_of_memory_and_link():
    rates = simulated.simulated_rates(Sheet("made up", 1000, 100, 20))
    assert (rates.dram_gb_s, rates.link_gb_s, rates.sms) == (pytest.approx(880), pytest.approx(78), 20)


def test_the_rest_of_a_token_is_what_the_linear_layers_leave():
    arguments, session = SimpleNamespace(scope="end-to-end"), SimpleNamespace(device=Device("made up", 20))
    assert tuner.rest_us(arguments, 2.0, None, session, 1500.0) == 500.0


def test_facts_are_of_the_gpu_that_torch_counts(monkeypatch):
    import gpu  # here, since it loads CUDA ops

    asked = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234-ab"))
    monkeypatch.setattr(gpu.shutil, "which", lambda _: "/bin/nvidia-smi")
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **_: asked.append(command) or SimpleNamespace(
        returncode=0, stdout="580.1, 5, 16, 1980, 2619\n"))
    assert gpu.facts()["driver_version"] == "580.1" and "--id=GPU-1234-ab" in asked[0]


def test_rows_that_are_no_objects_are_refused(call, tmp_path):
    (tmp_path / "rows").write_text("[1]\n")
    with pytest.raises(UserError, match="expected JSON objects"):
        call(export_csv, tmp_path / "rows")


@pytest.mark.parametrize("arguments, says", [(("--seed", 2**64), "seed"), (("--length", 1), "length"), (("--samples", 0), "samples")])
def test_gains_of_wrong_numbers_are_refused(call, folder, arguments, says):
    with pytest.raises(UserError, match=says):
        call(measure_gains, folder, "--text", "pydoc", *arguments)


def test_removed_loss_is_that_of_a_quadratic():
    """For a loss 1/2 |o - target|^2 whose whole error is R x, compensating everything removes all of it; and ranks are
    by |x| in each chunk."""
    torch.manual_seed(0)
    x, residual = torch.randn(5, 1500), torch.randn(1500, 7)
    gradient = -(x @ residual)  # at the output without compensation, o - target = -R x
    by_rank = removed_by_rank(x, gradient, residual)
    assert [len(part) for part in by_rank] == [1024, 476]
    gain = at_k_chunk(by_rank)
    assert gain[0] == 0 and gain[1024] == pytest.approx(float(0.5 * gradient.square().sum()), rel=1e-4)
    order = x[:, :1024].abs().argmax(dim=1), x[:, 1024:].abs().argmax(dim=1) + 1024
    first = sum(float(-0.5 * x[t, c] * (gradient[t] @ residual[c])) for best in order for t, c in enumerate(best))
    assert gain[1] == pytest.approx(first, rel=1e-4)


def test_gains_of_normal_inputs_are_those_of_drawn_ones():
    layer = random_weights("llama-3-8b", 3, "codebook").layers[0]
    gain, = of_normal_inputs([layer]).values()
    drawn = torch.randn(2000, 1024, generator=torch.Generator().manual_seed(0)).square().sort(descending=True).values
    share = (drawn.cumsum(1) / drawn.sum(1, keepdim=True)).mean(0)
    assert gain[0] == 0 and gain[1024] == pytest.approx(layer.count)
    assert torch.allclose(gain[1:] / layer.count, share.double(), atol=2e-3)


def test_returns_diminish():
    assert diminishing(torch.tensor([0.0, 5, 6, 9, 9, 8], dtype=torch.float64)).tolist() == [0, 5, 7, 9, 9, 9]
    smooth = torch.arange(1025, dtype=torch.float64).sqrt()
    assert torch.allclose(diminishing(smooth), smooth)
    noise = 0.02 * torch.randn(1025, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(0)
    found = diminishing(smooth + noise)
    assert (found - smooth).abs().max() < 1.5 and bool((found.diff().diff() <= 1e-9).all())


@pytest.mark.parametrize("arguments, says", [
    ((), "model: expected either"),
    (("--random-weights", "gpt-9"), "random-weights"),
    (("--random-weights", "llama-3-8b", "--bits", "5", "--simulate", "4090"), "bits"),
    (("--random-weights", "llama-3-8b", "--simulate", "9999"), "simulate: expected one of 4090"),
    (("--random-weights", "llama-3-8b", "--law"), "law: only a simulation"),
    (("nowhere", "--simulate", "4090"), "no such file"),
    *((("--random-weights", "llama-3-8b", "--simulate", "4090", "--target", percent), "target: expected finite")
      for percent in ("0", "inf", "nan"))])
def test_profile_refusals(call, tmp_path, arguments, says):
    with pytest.raises(UserError, match=says):
        call(run_profile, *arguments, "--profile", tmp_path / "rows")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_is_one_line(tmp_path):
    assert "use --simulate" in refused(run_script(ROOM / "run_profile.py", *RANDOM[:2], "--profile", tmp_path / "p"))


@pytest.mark.parametrize("arguments, says", [
    (("--profile", "none"), "no such file"),
    (("--selection", "bucket"), "no base time"),
    (("--each-block", "--objective", "paper"), "each-block: goes with"),
    (("--scope", "end-to-end", "--token-ms", "1"), "the linear layers alone take"),
    (("--profile", "text"), "line 1"),
    (("--timer", "true", "--sms", "20"), "it does not go with --sms"),
    (("--scope", "end-to-end", "--timer", "no-such-command"), "no-such-command' cannot be run"),
    (("--scope", "end-to-end", "--timer", "true"), "'true' ended, or answered with"),
    (("--scope", "end-to-end", "--timer", "cat"), "something else than a line of JSON with base_ms"),
    (("--saved",), "saved: tunes for the GPU of the profile's rows"),
    *((("--target", percent), "target: expected finite") for percent in ("-1", "inf", "nan"))])
def test_tuner_refusals(call, profile, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("not rows")
    with pytest.raises(UserError, match=says):
        call(tuner, *RANDOM, "--profile", profile, "--out", "plan.json", *arguments)
    with pytest.raises(UserError, match="say where the plan goes"):
        call(tuner, *RANDOM, "--profile", profile)
    assert not (tmp_path / "plan.json").exists()
