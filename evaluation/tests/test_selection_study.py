import math
import re
from pathlib import Path

import pytest
import torch
from selection_study import KEY, Variant, variants
from selection_study_calibration import Seen, constant_share, low_rank, spread
from selection_study_forms import FORMS
from selection_study_layers import Choice, Chooser, StudyLinear

from decdec import models, packing, text
from decdec.files import append_row, read_rows
from decdec.linear import CompensatedLinear
from decdec.reference import CHUNK
from decdec.testing import refused, run_script

ROOT = Path(__file__).parents[2]
SHORT = ("--text", "pydoc", "--windows", 2, "--length", 64)


def study(out, folder, *arguments):
    return run_script(ROOT / "evaluation/selection_study.py", "--model", folder, "--out", out, *SHORT, "--calibration", "pydoc",
                      "--samples", 2, *arguments)


@pytest.fixture(scope="module")
def rows(folder, tmp_path_factory):
    """Every variant of a uniform base at k_chunk 0, 16 and 1024."""
    out = tmp_path_factory.mktemp("study") / "rows.jsonl"
    result = study(out, folder, "--k-chunk", 0, 16, 64, CHUNK)
    assert result.returncode == 0, result.stderr
    return out


def perplexity_of(rows, variant, k_chunk):
    found, = [row for row in read_rows(rows) if (row["variant"], row["k_chunk"]) == (variant, k_chunk)]
    return found["perplexity"]


@pytest.mark.parametrize(("variant", "options"), [("paper 4", ()), ("nested 2", ("--nested",)), ("nested 3", ("--nested", "--bits", 3))])
def test_emulation_gives_what_the_ops_give(rows, folder, tmp_path, variant, options):
    made = run_script(ROOT / "decdec_setup/cheatsheet.py", folder, "--out", tmp_path / "sheet.pt", *options)
    assert made.returncode == 0, made.stderr
    out = tmp_path / "perplexity.jsonl"
    result = run_script(ROOT / "evaluation/perplexity.py", "--model", folder, "--cheatsheet", tmp_path / "sheet.pt", "--out", out, *SHORT,
                        "--k-chunk", 16, "--selection", "exact")
    assert result.returncode == 0, result.stderr
    assert perplexity_of(rows, variant, 16) == pytest.approx(read_rows(out)[0]["perplexity"], rel=3e-4)


def test_everything_restored_is_full_precision(rows, original):
    ids = text.windows(text.load_text("pydoc", "evaluation"), models.load_tokenizer(str(original)), 64, 2)
    model = models.load_model(str(original), torch.float32)
    with torch.inference_mode():
        losses = [float(model(window[None], labels=window[None]).loss) for window in ids]
    assert perplexity_of(rows, "exact 16", CHUNK) == pytest.approx(math.exp(sum(losses) / 2), rel=2e-4)
    assert abs(perplexity_of(rows, "paper 4", 0) - math.exp(sum(losses) / 2)) > 0.1


def test_costs_are_those_of_the_packed_rows(rows, folder):
    from decdec import artifacts
    sheet = artifacts.load_cheatsheet(folder / "cheatsheet.pt", artifacts.read_quant_config(folder))
    by_variant = {(row["variant"], row["k_chunk"]): row for row in read_rows(rows)}
    four, two = by_variant["paper 4", 16], by_variant["nested 2", 16]
    assert four["host_bytes"] == sum(t.nbytes for t in sheet.residual.values()) == 2 * two["host_bytes"]
    assert four["fetched_bytes"] == sum((3 if len(t) == 192 else 17) * t.shape[1] for t in sheet.residual.values())
    assert (four["added_device_bytes"], two["added_device_bytes"]) == (sum(t.nbytes for t in sheet.scale.values()), 0)
    assert by_variant["nested 2, k_chunk by layer", 16]["fetched_bytes"] <= 1.05 * two["fetched_bytes"]
    assert by_variant["nested 2, ranked with row norms", 16]["fetched_bytes"] == two["fetched_bytes"]


def test_rows_are_kept_and_every_variant_has_its_own(rows, folder):
    before = rows.read_text()
    assert study(rows, folder, "--k-chunk", 16).returncode == 0
    assert rows.read_text() == before
    found = read_rows(rows)
    assert len({tuple(str(row[name]) for name in KEY) for row in found}) == len(found)
    assert {row["variant"] for row in found} == {variant.name for variant in variants(uniform=True)}
    assert len({row["perplexity"] for row in found if row["k_chunk"] == 16}) > len(variants(uniform=True)) * 0.8


def test_mistakes_end_in_one_line(folder, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert "expected one of paper 4" in refused(study(out, folder, "--variant", "best"))
    assert "exact residuals" in refused(study(out, folder, "--cheatsheet", folder / "cheatsheet.pt"))
    assert "--samples" in refused(study(out, folder, "--samples", 0))
    assert not out.exists()


@pytest.fixture(params=["codebook", "uniform"])
def layer(request):
    """A layer of 1100 inputs and 48 outputs whose residual is what rounding to the base leaves."""
    draw = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.rand((48, 1100), generator=draw) - 0.02
    if request.param == "codebook":
        table = weight.quantile((torch.arange(8) + 0.5) / 8, dim=1).t().contiguous()
        codes = (weight[:, :, None] - table[:, None]).abs().argmin(2)
        codebook, scale = packing.pack_codebook(table)
        packed = {"qweight": packing.pack_codes(codes, 3), "codebook": codebook, "scale": scale}
    else:
        step = (weight.view(48, 11, 100).abs().amax(2) / 3.5).half()
        codes = (weight.view(48, 11, 100) / step.float()[:, :, None] + 3.5).round().clamp(0, 7).long().flatten(1)
        packed = {"qweight": packing.pack_codes(codes, 3), "scales": step.t().contiguous(), "zeros": torch.full((11, 48), 3.5).half()}
    compensated = CompensatedLinear("model.layers.0.mlp.up_proj", 1100, packed)
    return StudyLinear(compensated, weight - compensated.dequantize(torch.float32), Chooser(), "cpu")


def test_forms_leave_the_error_that_theory_predicts(layer):
    uniform = layer.scales is not None
    energy = torch.rand(layer.d_in) + 0.1
    left = {}
    for name, form in FORMS.items():
        if (name == "nested" and not uniform) or (name == "cell" and uniform) or name == "groups of 64":
            continue  # of the other base; and 64 does not divide 1100 inputs
        for bits in (1, 2, 3):
            if name != "paper" or bits == 2:
                dense, added = form(layer, layer.exact, bits, energy)
                left[name, bits] = float((dense - layer.exact).square().sum() / layer.exact.square().sum())
                assert added >= 0
    bounded = "nested" if uniform else "cell"
    for bits in (1, 2, 3):  # each bit quarters the squared error of a residual that fills its interval evenly
        assert left[bounded, bits] == pytest.approx(0.25**bits, rel=0.25)
    assert left["table", 2] <= left["fitted", 2] <= left["paper", 2]
    assert left["row scales", 2] == left["row planes", 2] and left["row planes", 3] < 0.5 * left["row planes", 2]
    assert left["exact", 1] < 1e-6


def test_row_scales_keep_small_rows_from_the_noise_of_large_ones(layer):
    target = layer.exact * torch.linspace(0.05, 2, layer.d_in)
    error = {name: (FORMS[name](layer, target, 2, torch.ones(layer.d_in))[0] - target).square().mean(0) / target.square().mean(0)
             for name in ("fitted", "row scales")}
    assert error["row scales"].max() < 0.2 and error["fitted"][:100].mean() > 1  # there storing nothing would be better


def test_chosen_channels_and_shares(layer):
    x = torch.randn((2, 5, 1100), generator=torch.Generator().manual_seed(1))
    layer.residuals, layer.choice = [layer.exact, 2 * layer.exact], Choice(8, shares=(0.5, 1.0))
    out = layer(x)
    want = x @ layer.weight.t()
    for start, stop, (first, second) in ((0, 1024, (4, 12)), (1024, 1100, (0, 2))):  # round(0.5) is 0: halves go to even
        order = x[:, :, start:stop].abs().argsort(dim=-1, descending=True) + start
        for channels, factor in ((order[..., :first], 1), (order[..., first:second], 2)):
            for b in range(2):
                for t in range(5):
                    want[b, t] += factor * x[b, t, channels[b, t]] @ layer.exact[:, channels[b, t]].t()
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    assert Choice(8, 256).counts(1100) == [(256, [2])] * 4 + [(76, [1])] and Choice(8, None).counts(1100) == [(1100, [9])]


def test_ties_are_chosen_no_more_often_than_asked_for():
    x = torch.ones(2, 1100)
    first, second = Chooser().cut(x, x, Choice(8, shares=(0.25, 0.75)))
    assert first.sum(1).tolist() == [2, 2] and second.sum(1).tolist() == [7, 7] and float((first * second).sum()) == 0


def test_centring_leaves_the_first_position_alone(layer):
    x = torch.randn((2, 5, 1100), generator=torch.Generator().manual_seed(2)) + 1
    mean = torch.ones(1100)
    layer.mean = mean
    want = x @ layer.weight.t()
    want[:, 1:] += layer.exact @ mean
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    layer.residuals, layer.choice = [layer.exact], Choice(CHUNK)
    torch.testing.assert_close(layer(x), x @ (layer.weight + layer.exact).t(), rtol=1e-4, atol=1e-3)


def seen_of(layer, x):
    return Seen(x.mean(0), x.t() @ x / len(x), torch.linspace(0, 1, CHUNK + 1), 1.0)


def test_low_rank_repair_and_constant_share_are_the_best_ones(layer):
    x = torch.randn((3000, 1100), generator=torch.Generator().manual_seed(3)) * torch.linspace(0.1, 3, 1100) + 0.5
    seen = seen_of(layer, x)
    errors = (x @ layer.exact.t()).double()
    assert constant_share(layer, seen) == pytest.approx(float(errors.mean(0).square().sum() / errors.square().sum(1).mean()), rel=1e-3)
    least = (torch.linalg.svdvals(errors)[8:].square().sum() / len(x)).item()  # Eckart and Young
    left = (x @ (layer.exact - low_rank(layer, seen, 8)).t()).double().square().sum(1).mean().item()
    assert left == pytest.approx(least, rel=1e-2)


def test_spread_keeps_the_bytes_and_prefers_the_layer_that_matters(layer):
    x = torch.randn((10, 1100))
    layers = {"a": layer, "b": layer}
    seen = {name: seen_of(layer, x) for name in layers}
    seen["b"].slope = 3.0
    seen["a"].removed = seen["b"].removed = 1 - 0.99 ** torch.arange(CHUNK + 1.0)
    chosen = spread(layers, seen, 16)
    assert chosen["b"] > chosen["a"] and 28 <= chosen["a"] + chosen["b"] <= 34


def test_variant_names_tell_them_apart():
    for uniform in (True, False):
        assert len({variant.name for variant in variants(uniform)}) == len(variants(uniform))
    assert Variant("nested", 0, tiers=((0.5, 2), (1.0, 1))).name == "nested 0.5x2/1x1"


def test_the_figure_and_its_tables(tmp_path):
    rows = tmp_path / "rows.jsonl"
    shared = {"bench": "selection_study", "model": "M", "method": "awq", "bits": 3, "text": "t", "text_hash": "h", "windows": 3,
              "window_length": 8, "dtype": "tf32", "calibration_hash": "c", "weights_hash": "w", "added_device_bytes": 0}
    for variant, form, k_chunk, base in (("paper 4", "paper", 0, 3.0), ("paper 4", "paper", 8, 2.5), ("nested 2", "nested", 8, 2.55),
                                         ("nested 2", "nested", 16, 2.4)):
        bits = int(variant[-1])
        append_row(rows, shared | {"variant": variant, "form": form, "k_chunk": k_chunk, "perplexity": math.exp(base), "host_bytes": 10**6 * bits,
                                   "fetched_bytes": bits * k_chunk * 1000, "losses": [base - 0.5, base, base + 0.5]})
    result = run_script(ROOT / "evaluation/figures/selection_study.py", rows, "--out", tmp_path / "made")
    assert result.returncode == 0, result.stderr
    lost = 100 * (math.exp(2.55) - math.exp(2.5)) / (math.exp(3.0) - math.exp(2.5))
    assert f"({lost:+.1f} ± 0.0)" in result.stdout  # the same in every window: no error, however much the windows differ
    assert f"{math.exp(2.4):.2f} ({math.exp(2.4) - math.exp(2.5):+.2f}" in result.stdout
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"selection_study.md", "selection_study_m_awq.pdf", "selection_study_m_awq.png"}


def test_at_scale_meets_the_papers_values_and_moves_with_the_bytes(tmp_path):
    rows = tmp_path / "rows.jsonl"
    shared = {"bench": "selection_study", "model": "M", "method": "awq"}
    for k_chunk, share in ((0, 0.0), (8, 0.0526), (56, 0.107), (16, 0.07), (128, 0.2)):
        for variant in ("paper 4", "nested 2"):
            append_row(rows, shared | {"variant": variant, "k_chunk": k_chunk, "perplexity": 40 * math.exp(-3 * share)})
    made = run_script(ROOT / "autotuner/at_scale.py", "--gpu", "4050M", "--out", tmp_path / "scale.jsonl")
    assert made.returncode == 0, made.stderr
    result = run_script(ROOT / "evaluation/figures/at_scale.py", rows, tmp_path / "scale.jsonl", "--gpu", "4050M", "--target", 5, "--out",
                        tmp_path / "picture")
    assert result.returncode == 0, result.stderr
    row, = (line for line in result.stdout.splitlines() if line.startswith("| 4050M"))
    paper, nested = re.findall(r"([\d.]+) \(k (\d+)\)", row)
    assert abs(int(nested[1]) - 2 * int(paper[1])) <= 1 and float(nested[0]) < float(paper[0])
    assert 56 < int(paper[1]) < 70 and float(paper[0]) == pytest.approx(9.1, abs=0.1)  # the paper: 9.12 at k_chunk 56
    assert "| llama-3-8b | 3.49 | 2.62 | 1.74 | 0.87 |" in result.stdout and (tmp_path / "picture.png").is_file()
    assert "no at scale rows" in refused(run_script(ROOT / "evaluation/figures/at_scale.py", rows, "--out", tmp_path / "none"))
