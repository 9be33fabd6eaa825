import pytest
import torch

from decdec.models import load_model
from decdec.tiny import make_model

from quantize import quantize

@pytest.fixture(autouse=True, scope="session")
def two_threads():
    torch.set_num_threads(2)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECDEC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def calibration():
    return {"text": "pydoc", "samples": 3, "length": 64}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a random two-layer Llama whose norms and value channels are not all alike, as in a trained model."""
    folder = make_model(tmp_path_factory.mktemp("models") / "tiny")
    model = load_model(str(folder))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 + 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantized(tiny, calibration):
    """``quantized(method, bits)``: a finished folder, made once a session."""
    made = {}

    def make(method, bits=3):
        if (method, bits) not in made:
            out = tiny.parent / f"tiny-{method}-w{bits}"
            assert quantize(str(tiny), method, bits, str(out), **calibration)
            made[method, bits] = out
        return made[method, bits]

    return make
