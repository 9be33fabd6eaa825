"""Every CUDA source compiles, for the oldest and the newest architecture, where nvcc is: no GPU is needed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXTENSION = Path(__file__).resolve().parents[1]
ARCHS = "8.0;12.0"
MAX_STACK = 128  # bytes a thread: what a kernel may spill before it is worth a look


def load_setup():
    spec = importlib.util.spec_from_file_location("decdec_setup_script", EXTENSION / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_cuda_source_compiles(tmp_path, monkeypatch):
    setup = load_setup()
    monkeypatch.setenv("DECDEC_CUDA", "auto")
    monkeypatch.setattr(setup.torch.version, "cuda", setup.torch.version.cuda or "any")
    if setup.find_nvcc() is None:
        pytest.skip("needs nvcc")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", ARCHS)
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-Xptxas -v")
    (tmp_path / "build.ninja").write_text(setup.ninja_file(tmp_path / "_ops.so", tmp_path))
    objects = re.findall(r"^build (\S+\.o): nvcc ", (tmp_path / "build.ninja").read_text(), re.MULTILINE)
    sources = [path for path in (EXTENSION / "csrc").rglob("*.cu")]
    assert len(objects) >= len(sources) > 0
    ninja = Path(sys.executable).parent / "ninja"
    result = subprocess.run([ninja if ninja.exists() else "ninja", *objects], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert all(Path(name).stat().st_size > 0 for name in objects)
    assert "warning" not in result.stdout.replace("Wno-", ""), result.stdout[-4000:]
    stacks = {match[0]: int(match[1]) for match in
              re.findall(r"Function properties for (\S+)\n\s+(\d+) bytes stack frame", result.stdout)}
    assert any("gemv_kernel" in name for name in stacks)
    assert max(stacks.values()) <= MAX_STACK, sorted(stacks.items(), key=lambda item: -item[1])[:5]
