"""Every CUDA source compiles, for the oldest and the newest architecture, where nvcc is: no GPU is needed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXTENSION = Path(__file__).resolve().parents[1]
OLDEST, NEWEST = "8.0", "12.0"
OF_BOTH = ("codebook_3", "attend_half")  # compiled for the newest as well, which takes the paths from Hopper on
MAX_STACK = 512  # bytes a thread: what a kernel may spill before it is worth a look


def load_setup():
    spec = importlib.util.spec_from_file_location("decdec_setup_script", EXTENSION / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("listed, flags, said", [
    ("8.0", ["arch=compute_80,code=sm_80"], ""),
    ("5.2 7.0 7.5+PTX 9.0 10.0+PTX", ["arch=compute_90,code=sm_90", "arch=compute_100,code=sm_100",
                                      "arch=compute_100,code=compute_100"], "left out 5.2, 7.0, 7.5+PTX"),
    ("7.5;8.9", ["arch=compute_89,code=sm_89"], "left out 7.5"),
])
def test_listed_architectures_from_8_0_on_are_built(monkeypatch, capsys, listed, flags, said):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert load_setup().gencode_flags("nvcc") == [f"-gencode={flag}" for flag in flags]
    heard = capsys.readouterr().err
    assert said in heard and bool(said) == bool(heard)


@pytest.mark.parametrize("listed", ["7.0 7.5", "Turing"])
def test_listed_architectures_that_cannot_be_built(monkeypatch, listed):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: expected"):
        load_setup().gencode_flags("nvcc")


@pytest.mark.parametrize("arch", (OLDEST, NEWEST))
def test_every_cuda_source_compiles(tmp_path, monkeypatch, arch):
    setup = load_setup()
    monkeypatch.setenv("DECDEC_CUDA", "auto")
    monkeypatch.setattr(setup.torch.version, "cuda", setup.torch.version.cuda or "any")
    if setup.find_nvcc() is None:
        pytest.skip("needs nvcc")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", arch)
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-Xptxas -v")
    (tmp_path / "build.ninja").write_text(setup.ninja_file(tmp_path / "_ops.so", tmp_path))
    objects = re.findall(r"^build (\S+\.o): nvcc ", (tmp_path / "build.ninja").read_text(), re.MULTILINE)
    assert len(objects) >= len(list((EXTENSION / "csrc").rglob("*.cu"))) > 0
    if arch == NEWEST:
        objects = [name for name in objects if Path(name).name.split(".")[0] in OF_BOTH]
        assert len(objects) == len(OF_BOTH)
    ninja = Path(sys.executable).parent / "ninja"
    command = [ninja if ninja.exists() else "ninja", *objects]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert all(Path(name).stat().st_size > 0 for name in objects)
    stacks = {
        match[0]: int(match[1])
        for match in re.findall(r"Function properties for (\S+)\n\s+(\d+) bytes stack frame", result.stdout)
    }
    assert any("gemv_kernel" in name for name in stacks)
    assert max(stacks.values()) <= MAX_STACK, sorted(stacks.items(), key=lambda item: -item[1])[:5]
