import pytest
import torch

from decdec.artifacts import load_thresholds, read_quant_config
from decdec.models import decoder_linears, load_model, load_tokenizer
from decdec.original import load_original_thresholds
from decdec.text import calibration_samples, load_text

from scaling import read_scaling, scale_model
from thresholds import make_thresholds


@pytest.mark.parametrize("method", ["squeezellm", "awq"])
def test_thresholds_are_those_of_a_naive_loop(calibration, tiny, quantized, tmp_path, method):
    folder = quantized(method)
    quant = read_quant_config(folder)
    path = make_thresholds(folder, out=tmp_path / "thresholds.pt", **calibration)
    found = load_thresholds(path, quant)

    tokens = calibration_samples(load_text("pydoc", "calibration"), load_tokenizer(str(tiny)), calibration["samples"],
                                 calibration["length"], 0)
    model = scale_model(load_model(str(tiny), torch.float32), read_scaling(folder))
    inputs = {}
    for name, module in decoder_linears(model).items():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).extend(args[0].flatten(0, 1)))
    with torch.no_grad():
        for sample in tokens:
            model(sample[None])
    assert found.largest.keys() == inputs.keys()
    for name, rows in inputs.items():
        ranked = torch.stack([row.abs().sort(descending=True).values for row in rows]).max(0).values
        square = torch.stack([row**2 for row in rows]).mean(0)
        # Hidden states wait between blocks in the model's own float16.
        torch.testing.assert_close(found.largest[name], ranked, rtol=5e-3, atol=1e-3)
        torch.testing.assert_close(found.mean_square[name], square, rtol=5e-3, atol=1e-5)
        assert (found.largest[name].diff() <= 0).all()
        b_0, b_15 = found.boundaries(name, 8)
        assert b_0 == float(found.largest[name][0]) >= b_15 > 0

    original = load_original_thresholds(make_thresholds(folder, layout="original", out=tmp_path / "o.pt", **calibration), "model.layers")
    assert all(torch.equal(original[name], found.largest[name]) for name in inputs)
    assert make_thresholds(folder, out=path, **calibration) is None
    assert make_thresholds(folder, out=path, **calibration | {"seed": 1}) == path
