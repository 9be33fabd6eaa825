"""The static repair: best for its rank, harmless to every token, switched on only where held-out text says so."""

import json
from pathlib import Path

import pytest
import torch

from decdec.artifacts import REPAIR, load_cheatsheet, load_repair, read_quant_config
from decdec.errors import UserError
from decdec.models import decoder_linears, load_model
from decdec.testing import refused, run_script

import repair as script
from cheatsheet import make_cheatsheet
from groups import Group
from quantized_blocks import QuantizedBlocks
from repair import Settings, error_left, low_rank, make_repair, repair_group
from scaling import read_scaling, scale_model

ROOM = Path(__file__).resolve().parents[1]
D_IN, D_OUT = 96, 40


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def correlated(tokens, mean=0.0):
    """Inputs whose channels have something to do with each other."""
    return torch.randn(tokens, 12) @ torch.randn(12, D_IN, generator=torch.Generator().manual_seed(1)) + torch.randn(tokens, D_IN) + mean


@pytest.mark.parametrize("k_chunk", (0, 85))
@pytest.mark.parametrize("centred", (False, True))
def test_no_repair_of_its_rank_leaves_less(centred, k_chunk):
    residual, fit = torch.randn(D_OUT, D_IN), correlated(500, mean=3 * torch.randn(D_IN))
    mean = fit.mean(0) if centred else None
    repair = low_rank(residual, fit, 5, mean, k_chunk)
    rest = fit.clone() if mean is None else fit - mean
    for token in rest:  # what the channels that are fetched leave, 8 of 96
        token[token.abs().argsort(descending=True)[:8 * (k_chunk > 0)]] = 0
    outputs = rest @ residual.t()
    left = outputs - rest @ (repair.up.float() @ repair.down.float()).t()
    least = torch.linalg.svdvals(outputs)[5:].square().sum()
    assert 0.999 * least <= left.square().sum() <= 1.01 * least
    if centred:
        remains = residual - repair.up.float() @ repair.down.float()
        torch.testing.assert_close(repair.constant.float(), remains @ mean, rtol=1e-2, atol=1e-2)


def test_low_rank_harms_no_token():
    residual = torch.randn(D_OUT, D_IN)
    repair = low_rank(residual, correlated(500), 5)
    strange = torch.cat([torch.randn(50, D_IN), 1000 * torch.eye(D_IN)])
    left = strange @ (residual - repair.up.float() @ repair.down.float()).t()
    assert (left.norm(dim=1) <= 1.002 * (strange @ residual.t()).norm(dim=1)).all()  # float16 directions are not quite orthogonal


def test_error_left_is_that_of_a_naive_loop():
    residual, held_out = torch.randn(D_OUT, D_IN), correlated(20, mean=torch.randn(D_IN))
    mean = correlated(300, mean=torch.ones(D_IN)).mean(0)
    repair = low_rank(residual, correlated(300), 3, mean)
    up, down = repair.up.float(), repair.down.float()
    shares = []
    for token in held_out:
        x = token - mean if (token - mean).norm() < token.norm() else token
        chosen = x.abs().argsort(descending=True)[:8]  # a share of 85 in 1024, of 96 channels
        remains = residual - up @ down
        out = up @ (down @ token) + remains @ (token - x) + remains[:, chosen] @ x[chosen]
        shares.append((residual @ token - out).square().sum() / (residual @ token).square().sum())
    assert error_left(residual, repair, held_out, 85) == pytest.approx(float(torch.stack(shares).mean()), rel=1e-3)


def test_only_what_pays_is_repaired():
    fit, held_out = correlated(600), correlated(200)
    ordinary = torch.randn(400, D_IN)  # whose every direction matters little
    steep = torch.randn(400, 2) @ torch.randn(2, D_IN) * 5 + 0.1 * ordinary
    white = torch.randn(600, D_IN), torch.randn(200, D_IN)
    assert repair_group({"a": ordinary}, *white, Settings(rank=1)) == {}
    found = repair_group({"a": steep, "b": ordinary}, fit, held_out, Settings(rank=2))
    assert len(found["a"].down) == 2 and found["a"].mean is None
    # A mean that every token has, and a sink that has none of it.
    mean = 4 * torch.randn(D_IN)
    shifted, sink = torch.randn(600, D_IN) + mean, 1000 * torch.eye(D_IN)[:1]
    found = repair_group({"a": ordinary, "b": steep}, shifted, torch.cat([torch.randn(200, D_IN) + mean, sink]), Settings(rank=0))
    assert all(torch.allclose(repair.mean, shifted.mean(0)) and not len(repair.down) for repair in found.values())
    assert repair_group({"a": ordinary}, shifted, shifted, Settings(rank=1, center="off"))["a"].mean is None
    assert set(repair_group({"a": ordinary}, *white, Settings(rank=0, center="on"))) == {"a"}


@pytest.mark.parametrize("method", ("squeezellm", "awq"))
def test_the_folder_gets_it(calibration, tiny, quantized, tmp_path, method):
    folder, quant = quantized(method), read_quant_config(quantized(method))
    settings, short = Settings(rank=4, k_chunk=64), calibration | {"samples": 4}
    path = make_repair(folder, settings, **short)
    repair = load_repair(path, quant)
    assert path == folder / REPAIR and repair.calibration["rank"] == 4
    model, blocks = scale_model(load_model(str(tiny), torch.float32), read_scaling(folder)), QuantizedBlocks(folder)
    sheet = load_cheatsheet(make_cheatsheet(folder, bits=16, repaired=True, out=tmp_path / "remains.pt"), quant)
    assert repair.layers and sheet.repair == repair.hash
    for name, module in decoder_linears(model).items():
        residual = module.weight.detach() - blocks.weight(name, module.weight.shape)
        static = repair.layers[name].to("cpu", torch.float32) if name in repair.layers else None
        stored = sheet.dequantize(name, len(residual)).t() + (0 if static is None else static.up @ static.down)
        torch.testing.assert_close(stored, residual, rtol=1e-3, atol=1e-5)
    assert make_repair(folder, settings, **short) is None
    assert make_cheatsheet(folder, bits=16, repaired=True, out=tmp_path / "remains.pt") is None
    assert make_repair(folder, Settings(rank=2, k_chunk=64), **short) == path
    assert make_cheatsheet(folder, bits=16, repaired=True, out=tmp_path / "remains.pt") is not None  # of another repair now
    nested = load_cheatsheet(make_cheatsheet(folder, nested=True, repaired=True, out=tmp_path / "nested.pt"), quant)
    assert nested.nested and nested.row_scale  # what remains is within no step
    path.unlink()


def test_first_positions_are_held_out_but_not_fitted_to(quantized, monkeypatch):
    quantized = QuantizedBlocks(quantized("rtn"))
    name = next(name for name in decoder_linears(load_model(str(quantized.folder.parent / "tiny"))) if name.endswith("o_proj"))
    module = decoder_linears(load_model(str(quantized.folder.parent / "tiny")))[name].float()
    seen = [torch.full((3, module.in_features), float(sample)).index_fill(0, torch.tensor([0]), -1.0) for sample in range(8)]
    given = []
    monkeypatch.setattr(script, "repair_group", lambda residuals, fit, held_out, settings: given.extend((fit, held_out)) or {})
    script._of_group(Group({name: module}), seen, {}, quantized, Settings())
    assert [part[:, 0].tolist() for part in given] == [[1, 1, 2, 2, 3, 3, 5, 5, 6, 6, 7, 7], [-1, 0, 0, -1, 4, 4]]


def test_script(calibration, quantized):
    folder = quantized("squeezellm")
    arguments = ["--rank", 2, "--center", "on", "--text", "pydoc", "--samples", 4, "--length", 64]
    result = run_script(ROOM / "repair.py", folder, *arguments)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["layers"] == said["centred"] == len(load_repair(folder / REPAIR, read_quant_config(folder)).layers) == 14
    assert "nothing to do" in run_script(ROOM / "repair.py", folder, *arguments).stdout
    sheet = run_script(ROOM / "cheatsheet.py", folder, "--repaired", "--nested")
    assert json.loads(sheet.stdout)["wrote"].endswith("cheatsheet_repaired.pt")
    (folder / REPAIR).unlink()
    Path(json.loads(sheet.stdout)["wrote"]).unlink()
    assert "repair.pt: no such file" in refused(run_script(ROOM / "cheatsheet.py", folder, "--repaired"))


@pytest.mark.parametrize("settings, words", [
    ({"rank": -1}, "rank: expected 0 or more"), ({"center": "maybe"}, "center: expected one of auto, on, off"),
    ({"k_chunk": 1025}, "k_chunk: expected 0..1024"), ({"rank": 0, "center": "off"}, "rank: expected 1 or more")])
def test_mistakes_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        Settings(**settings)


def test_too_few_samples(quantized):
    with pytest.raises(UserError, match="samples: expected 4 or more"):
        make_repair(quantized("squeezellm"), samples=3, text="pydoc")
