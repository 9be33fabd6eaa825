"""The static repair: layers that use it follow its formula in every path, and it is saved, loaded, fused and switched off again."""

import shutil

import pytest
import torch
from torch.testing import assert_close

from decdec import hub, packing
from decdec.artifacts import REPAIR, REPAIRED_CHEATSHEET, Repair, load_cheatsheet, load_repair, read_quant_config, save_repair
from decdec.errors import UserError
from decdec.linear import BASE_ROWS, FEW_ROWS, Compensation, CompensatedLinear, fuse
from decdec.models import load_model
from decdec.repair import LayerRepair, join
from decdec.testing import add_repair, quick_folder
from decdec.tiny import make_model

D_IN, D_OUT, RANK = 1100, 40, 3


def repair_of(d_in=D_IN, d_out=D_OUT, rank=RANK, mean=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    down, up, constant = (torch.randn(shape, generator=generator).half() for shape in ((rank, d_in), (d_out, rank), (d_out,)))
    return LayerRepair(down, up, mean, None if mean is None else constant)


def layer_of(repair=None, d_in=D_IN, d_out=D_OUT, seed=0):
    """A layer of round-to-nearest weights, its base and residual as dense float64 matrices."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 8, (d_out, d_in), generator=generator)
    codebook, scale = packing.pack_codebook(torch.randn((d_out, 8), generator=generator))
    residual = torch.randn((d_in, d_out), generator=generator).half()
    layer = CompensatedLinear("x.q_proj", d_in, {"qweight": packing.pack_codes(codes, 3), "codebook": codebook, "scale": scale})
    layer.set_residual(packing.pack_residual(residual, 16), None, 16, False, repaired=True)
    layer.repair = repair
    base = (codebook.double() * scale.double()[:, None]).gather(1, codes)
    return layer, base, residual.double()


def expected(x, base, residual, repair, k_chunk):
    """The formula of decdec/repair.py, token by token in float64."""
    rows = []
    for token in x.double():
        out = base @ token + repair.up.double() @ (repair.down.double() @ token)
        if repair.mean is not None and (token - repair.mean).norm() < token.norm():
            out, token = out + repair.constant.double(), token - repair.mean
        for start in range(0, len(token), 1024):
            part = token[start:start + 1024]
            for i in part.abs().argsort(descending=True)[:-(-k_chunk * len(part) // 1024)]:
                out = out + part[i] * residual[start + i]
        rows.append(out)
    return torch.stack(rows)


def inputs(rows, mean=None):
    x = torch.randn((rows, D_IN), generator=torch.Generator().manual_seed(7))
    if mean is not None:
        x[::2] += mean  # every second one is near
    return x


@pytest.mark.parametrize("centred", (False, True))
@pytest.mark.parametrize("k_chunk", (0, 8, 1024))
def test_layers_follow_the_formula(centred, k_chunk):
    mean = torch.randn(D_IN, generator=torch.Generator().manual_seed(3)) * 2 if centred else None
    repair = repair_of(mean=mean)
    layer, base, residual = layer_of(repair)
    layer.compensate(Compensation(k_chunk, "exact", prefill=True, repair=True))
    x = inputs(BASE_ROWS + 5, mean)
    want = expected(x, base, residual, repair, k_chunk).float()
    assert_close(layer(x), want, rtol=1e-4, atol=2e-3)  # by dequantizing
    assert_close(layer(x[:FEW_ROWS]), want[:FEW_ROWS], rtol=1e-4, atol=2e-3)  # by the ops
    assert_close(layer(x[1:2]), want[1:2], rtol=1e-4, atol=2e-3)
    stream, norm = torch.randn((1, D_OUT)), torch.rand(D_IN) + 0.5
    normed = torch.nn.functional.rms_norm(x[:1], (D_IN,), norm, 1e-5)
    want = stream + expected(normed, base, residual, repair, k_chunk).float()
    assert_close(layer.step(x[:1], stream, (norm, 1e-5)), want, rtol=1e-4, atol=2e-3)


def test_switched_off_it_is_not_there():
    layer, base, _ = layer_of(repair_of())
    x = inputs(2)
    layer.compensate(Compensation())
    assert_close(layer(x), (x.double() @ base.t()).float(), rtol=1e-4, atol=2e-3)
    with pytest.raises(UserError, match="repair False needs residuals made without --repaired"):
        layer.compensate(Compensation(8, "exact"))


@pytest.mark.parametrize("centred", (False, True))
def test_fused_layers_keep_theirs(centred):
    mean = torch.randn(D_IN) if centred else None
    repairs = [repair_of(d_out=width, rank=rank, mean=mean, seed=width) for width, rank in ((32, 2), (48, 0))]
    layers = [layer_of(repair if centred or len(repair.down) else None, d_out=len(repair.up), seed=i)[0]
              for i, repair in enumerate(repairs)]
    for layer in layers:
        layer.compensate(Compensation(16, "exact", repair=True))
    fused = fuse(layers, "x.qkv_proj")
    x = inputs(1, mean)
    assert_close(fused(x), torch.cat([layer(x) for layer in layers], dim=1), rtol=1e-4, atol=2e-3)


def test_layers_of_one_input_have_one_mean():
    with pytest.raises(UserError, match="one mean"):
        join([repair_of(mean=torch.zeros(D_IN)), repair_of(mean=torch.ones(D_IN))], [D_OUT, D_OUT], D_IN)
    with pytest.raises(UserError, match="one mean"):
        join([repair_of(mean=torch.zeros(D_IN)), None], [D_OUT, D_OUT], D_IN)
    assert join([None, None], [4, 4], D_IN) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model's folder with a repair, and residuals beside it that are not the plain ones."""
    path = tmp_path_factory.mktemp("repair")
    return add_repair(quick_folder(load_model(str(make_model(path / "original")), torch.float32), path / "quick"), without="down_proj")


@torch.no_grad()
def test_one_option_switches_it_on_and_off(folder, tmp_path):
    repairs = load_repair(folder / REPAIR, read_quant_config(folder)).layers
    model, ids = hub.load(folder), torch.randint(0, 200, (1, 9))
    plain = model(ids).logits
    sizes = [hub.memory(model)["device_bytes"]]
    hub.set_compensation(model, Compensation(repair=True))
    static = model(ids).logits
    sizes.append(hub.memory(model)["device_bytes"])
    assert not torch.equal(static, plain)
    added = sum(tensor.numel() for repair in repairs.values() for tensor in repair.tensors())
    assert sizes[1] - sizes[0] == 4 * added  # as float32
    for name, layer in hub.compensated_layers(model).items():
        assert (layer.repair is None) == ("down_proj" in name)
    hub.set_compensation(model, Compensation(8, "exact", prefill=True, repair=True))
    both = model(ids).logits
    name, layer = next(iter(hub.compensated_layers(model).items()))
    sheet = load_cheatsheet(folder / REPAIRED_CHEATSHEET, read_quant_config(folder))
    assert torch.equal(layer.residual, sheet.residual[name])
    hub.set_compensation(model, Compensation(8, "exact", prefill=True))
    assert not torch.equal(layer.residual, sheet.residual[name]) and not torch.equal(model(ids).logits, both)
    hub.set_compensation(model, Compensation())
    assert torch.equal(model(ids).logits, plain)

    model.save_pretrained(tmp_path / "saved")
    again = hub.load(tmp_path / "saved", compensation=Compensation(8, "exact", prefill=True, repair=True))
    assert torch.equal(again(ids).logits, both)


def test_residuals_that_do_not_belong_to_it_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    save_repair(tmp_path / "other" / REPAIR, Repair({}, {}), read_quant_config(folder))
    with pytest.raises(UserError, match="expected the residuals of what repair.pt leaves"):
        hub.load(tmp_path / "other", compensation=Compensation(8, "exact", repair=True))
    with pytest.raises(UserError, match="expected the residuals without a repair"):
        hub.load(folder, compensation=Compensation(8, "exact"), cheatsheet=folder / REPAIRED_CHEATSHEET)
    quick_folder(load_model(str(make_model(tmp_path / "original")), torch.float32), tmp_path / "quick")
    with pytest.raises(UserError, match="repair.pt: no such file"):
        hub.load(tmp_path / "quick", compensation=Compensation(repair=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("centred", (False, True))
@pytest.mark.parametrize("rows", (1, 3, FEW_ROWS + 5))
def test_a_gpu_agrees_with_the_cpu(centred, rows):
    mean = torch.randn(D_IN) if centred else None
    layer, _, _ = layer_of(repair_of(mean=mean))
    layer.compensate(Compensation(16, "exact", prefill=True, repair=True))
    x = inputs(rows, mean).half()
    want = layer(x)
    got = layer.cuda()(x.cuda())
    assert_close(got.cpu(), want, rtol=1e-2, atol=1e-2 * float(want.abs().mean()))
