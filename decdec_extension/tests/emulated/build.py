"""Builds the CUDA ops for the CPU: the sources of csrc, changed where plain C++ cannot say what they say."""

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FOLDER = HERE.parents[1] / "build" / "emulated"
# Fortified longjmp refuses to change to another fiber's stack.
FLAGS = (
    "-O1 -march=native -std=c++20 -fPIC -fvisibility=hidden -fno-gnu-unique -w -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=0 "
    "-DTORCH_TARGET_VERSION=0x020b000000000000"
)
LEFT_OUT = ("cuda_arena.cpp", "cuda_probe.cpp", "cpu_ops.cpp", "probe.cu")
REPLACED = ("instructions.cuh", "current_stream.h")


def declared_shared(match: re.Match) -> str:
    """``__shared__ T a[n], b[m];`` as variables of the emulation, which are new and full of NaN for each block."""
    variables = re.findall(r"(\w+)((?:\[[^\]]+\])*)(?:, |$)", match[2])
    return " ".join(
        f"auto& {name} = emulated::static_shared<{match[1]}{size}>({{__LINE__, {n}}});"
        for n, (name, size) in enumerate(variables)
    )


CHANGES = (
    (
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
        r"\1* \2 = static_cast<\1*>(emulated::dynamic_shared());",
    ),
    (r"__shared__ (?:__align__\(\d+\) )?(\w+) ([^;]+);", declared_shared),
    (r"([\w:]+(?:<[\w, ]+>)?)\s*<<<(.+?)>>>\(", r"emulated::launch(\1, \2, "),
    ("__noinline__ ", ""),
    ("torch::stable::accelerator::DeviceGuard", "emulated::DeviceGuard"),
    (r"STABLE_TORCH_LIBRARY\(decdec,", "STABLE_TORCH_LIBRARY(decdec_emulated,"),
    (r"STABLE_TORCH_LIBRARY_IMPL\(decdec, CUDA,", "STABLE_TORCH_LIBRARY_IMPL(decdec_emulated, CPU,"),
    (r"STABLE_TORCH_LIBRARY_IMPL\(decdec, ", "STABLE_TORCH_LIBRARY_IMPL(decdec_emulated, "),
)


def write(path: Path, text: str) -> None:
    """Writes a file unless it is so already, so that ninja compiles what changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def write_sources() -> list[Path]:
    """Writes the changed sources; returns what is to be compiled."""
    sources = []
    for part in ("kernels", "launch", "binding"):
        for source in sorted((CSRC / part).iterdir()):
            if source.name in LEFT_OUT:
                continue
            text = (HERE / source.name if source.name in REPLACED else source).read_text()
            for pattern, replacement in CHANGES:
                text = re.sub(pattern, replacement, text, flags=re.DOTALL)
            target = FOLDER / "csrc" / part / source.name
            write(target, text)
            if source.suffix in (".cu", ".cpp"):
                sources.append(target)
    return [*sources, HERE / "emulator.cpp"]


def build() -> Path:
    """The library of the emulated ops, ``torch.ops.decdec_emulated``. One process builds, others wait for it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(write_sources())


def _build(sources: list[Path]) -> Path:
    includes = " ".join(f"-I{path}" for path in (HERE, FOLDER / "csrc", *include_paths()))
    lib = Path(torch.__file__).parent / "lib"
    compiler = os.environ.get("CXX", "g++")
    lines = [
        "rule cxx",
        f"  command = {compiler} {FLAGS} {includes} -include emulator.h -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -L{lib} -ltorch -ltorch_cpu -o $out",
    ]
    objects = [f"{source.stem}.o" for source in sources]
    lines += [f"build {name}: cxx {source}" for name, source in zip(objects, sources)]
    lines.append(f"build emulated.so: link {' '.join(objects)}")
    write(FOLDER / "build.ninja", "\n".join(lines) + "\n")
    ninja = Path(sys.executable).parent / "ninja"
    result = subprocess.run([ninja if ninja.exists() else "ninja"], cwd=FOLDER, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the emulated ops do not compile:\n{result.stdout[-6000:]}")
    return FOLDER / "emulated.so"
