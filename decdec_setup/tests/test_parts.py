import pytest
import torch
from safetensors.torch import load_file

from parts import Parts, stream_tensors


def test_streamed_tensors_are_what_the_library_reads(tmp_path):
    torch.manual_seed(0)
    tensors = {"matrix": torch.randn(3, 5), "odd": torch.randn(7).half(), "number": torch.tensor(3), "none": torch.zeros(0, 4),
               "codes": torch.randint(0, 255, (5,), dtype=torch.uint8), "turned": torch.randn(4, 6).bfloat16().t(),
               "flags": torch.tensor([True, False, True]), "steps": torch.arange(-3, 4, dtype=torch.int16)}
    stream_tensors(tmp_path / "file.safetensors", {name: lambda tensor=tensor: tensor for name, tensor in tensors.items()})
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_a_stream_that_fails_leaves_no_half_file(tmp_path):
    parts = Parts(tmp_path / "parts", {})
    parts.save(0, {"a": torch.ones(4), "b": torch.arange(3)})
    loaders = parts.loaders(0)
    assert torch.equal(loaders["a"](), torch.ones(4)) and torch.equal(loaders["b"](), torch.arange(3))
    loads = []

    def fail():
        loads.append(1)
        if len(loads) == 2:  # the first tells its shape
            raise OSError("No space left on device")
        return torch.ones(2, dtype=torch.uint8)

    with pytest.raises(OSError):
        stream_tensors(tmp_path / "file.safetensors", loaders | {"c": fail})
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]
