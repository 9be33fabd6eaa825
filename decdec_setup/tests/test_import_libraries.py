"""Checkpoints in the hands of the libraries that own their formats: read as those read them, and compensated beside them."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from decdec import hub, models
from decdec.linear import Compensation, CompensatedLinear

from cheatsheet import make_cheatsheet
from foreign_layouts import EVERYTHING, SIZE, compressed, logits, rounded, scheme, settings, write
from import_checkpoint import import_checkpoint


def test_the_library_of_compressed_tensors_is_read_as_it_reads_itself(tiny, tmp_path):
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    for bits, symmetric in ((4, True), (4, False), (3, False), (2, True)):
        plan = QuantizationScheme(**scheme(bits, symmetric=symmetric))

        def pack(name, weight):
            _, scales, zeros, _ = rounded(weight, bits, symmetric)
            given = {"weight": weight, "weight_scale": scales,
                     "weight_zero_point": (zeros - 2**(bits - 1)).to(torch.int8)}
            stored = PackedQuantizationCompressor.compress(given, plan)
            return ({f"{name}.{key}": tensor for key, tensor in stored.items()},
                    PackedQuantizationCompressor.decompress(stored, plan)["weight"])

        foreign, out = tmp_path / f"foreign{bits}{symmetric}", tmp_path / f"out{bits}{symmetric}"
        want = write(tiny, foreign, pack, settings("compressed-tensors", bits) | {"version": library.__version__})
        import_checkpoint(str(foreign), out)
        model = hub.load(out)
        for name, linear in models.decoder_linears(want).items():
            assert_close(model.get_submodule(name).dequantize(torch.float32), linear.weight, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_in_the_hands_of_its_library_is_compensated_beside_it(tiny, tmp_path):
    pytest.importorskip("compressed_tensors")
    config = settings("compressed-tensors", 4) | {"quantization_status": "compressed", "ignore": ["lm_head"]}
    want = write(tiny, tmp_path / "foreign", lambda name, weight: compressed(name, weight, 4), config)
    out = tmp_path / "out"
    import_checkpoint(str(tmp_path / "foreign"), out, str(tiny))
    make_cheatsheet(out)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "foreign", dtype=torch.float32)
    assert "model.layers.0.mlp.up_proj.weight_packed" in theirs.state_dict()
    hub.attach(theirs, out)
    ours = hub.load(out)
    for setting in (Compensation(), EVERYTHING):
        for model in (theirs, ours):
            hub.set_compensation(model, setting)
        assert_close(logits(theirs), logits(ours), rtol=1e-3, atol=1e-3)
        assert ((logits(theirs) - logits(want)).abs().max() > 0.01) == (setting.k_chunk > 0)
    assert not any(isinstance(module, CompensatedLinear) for module in theirs.modules())


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_library_of_hqq_is_read_as_it_reads_itself_and_compensated_beside_it(tiny, tmp_path, bits):
    library = pytest.importorskip("hqq.core.quantize")
    layers = {}

    def pack(name, weight):
        linear = torch.nn.Linear(weight.shape[1], len(weight), bias=False)
        linear.weight.data.copy_(weight)
        config = library.BaseQuantizeConfig(nbits=bits, group_size=SIZE, axis=1)
        layer = layers[name] = library.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
        stored = {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items() if isinstance(tensor, torch.Tensor)}
        return stored, layer.dequantize()

    theirs = write(tiny, tmp_path / "foreign", pack, settings("hqq", bits))
    out = tmp_path / "out"
    import_checkpoint(str(tmp_path / "foreign"), out, str(tiny))
    make_cheatsheet(out)
    want = logits(theirs)
    for name, layer in layers.items():
        hub.replace(theirs, name, layer)
    assert_close(logits(theirs), want, rtol=1e-3, atol=1e-3)
    ours = hub.load(out)
    assert_close(logits(ours), want, rtol=1e-2, atol=1e-2)
    hub.attach(theirs, out)
    for model in (theirs, ours):
        hub.set_compensation(model, EVERYTHING)
    assert_close(logits(theirs), logits(ours), rtol=1e-2, atol=1e-2)
    assert (logits(theirs) - want).abs().max() > 0.01
