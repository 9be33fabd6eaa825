"""Builds the ops of DecDEC into one library, ``decdec/_ops.so``, with ninja.

The library uses torch's stable ABI and no symbol of Python, so one file serves any Python and torch 2.11 or later. The
CPU ops are always in it. The CUDA ops are added where ``nvcc`` is found and torch was built for CUDA; they need of it
nothing but the stable ABI. Environment variables:

``DECDEC_CUDA``           0: never build the CUDA ops; 1: build them even if this torch has no CUDA
``DECDEC_CPU_ARCH``       ``-march`` of the CPU ops; default ``native``, since the library runs where it is built
``TORCH_CUDA_ARCH_LIST``  compute capabilities, e.g. ``8.9;9.0+PTX``; default: all from 8.0 that the compiler knows
``MAX_JOBS``              parallel compiler processes
``CXX``, ``CUDA_HOME``    compilers
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TARGET_VERSION = "0x020b000000000000"  # stable ABI of torch 2.11
DEFAULT_CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0"

RULES = """
ninja_required_version = 1.5
rule cxx
  command = $cxx -MMD -MF $out.d $cxxflags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $in
rule nvcc
  command = $nvcc -MD -MF $out.d $nvccflags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule link
  command = $linker -shared $in $ldflags -o $out
  description = link $out
"""


def find_nvcc() -> str | None:
    """The CUDA compiler to use, or None if the CUDA ops are not wanted or cannot be built."""
    wanted = os.environ.get("DECDEC_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"DECDEC_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0" or (wanted == "auto" and torch.version.cuda is None):
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None and wanted == "1":
        raise SystemExit("DECDEC_CUDA=1: expected nvcc on PATH or in CUDA_HOME/bin, found none")
    return nvcc


def gencode_flags(nvcc: str) -> list[str]:
    """One ``-gencode`` for each architecture of ``TORCH_CUDA_ARCH_LIST``, PTX for the newest of the default list."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if listed:
        archs = re.split(r"[;, ]+", listed.strip())
        older = [arch for arch in archs if re.match(r"[1-7]\.", arch)]
        if older:  # as containers list them, for every GPU that torch knows
            print(f"decdec: left out {', '.join(older)}: the CUDA ops need compute capability 8.0", file=sys.stderr)
            archs = [arch for arch in archs if arch not in older]
        if not archs:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected compute capabilities from 8.0 on, got {listed!r}")
    else:
        known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
        archs = [a for a in DEFAULT_CUDA_ARCHS.split(";") if "compute_" + a.replace(".", "") in known]
        archs[-1] += "+PTX"
    flags = []
    for arch in archs:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 8.9 or 9.0+PTX, got {arch!r}")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def escape(path: Path | str) -> str:
    """A path as ninja wants it in a build line."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def argument(flag: str, path: Path | str) -> str:
    """A flag with a path as ninja hands it to the shell."""
    return shlex.quote(f"{flag}{path}").replace("$", "$$")


def ninja_file(output: Path, objects: Path) -> str:
    """The text of the build file that makes ``output`` from the sources, with object files below ``objects``."""
    nvcc = find_nvcc()
    lib = Path(torch.__file__).parent / "lib"
    cxx = os.environ.get("CXX", "g++")
    includes = " ".join([argument("-I", CSRC)] + [argument("-I", path) for path in include_paths()])
    common = f"-O3 -std=c++20 -DTORCH_TARGET_VERSION={TARGET_VERSION} {includes}"
    cpu_arch = os.environ.get("DECDEC_CPU_ARCH", "native")
    cxxflags = f"{common} -fPIC -fvisibility=hidden -Wall -Wextra"
    # libtorch.so brings libtorch_cuda.so where there is one, and with it the CUDA stream (binding/current_stream.h).
    ldflags = f"{argument('-L', lib)} -Xlinker --no-as-needed -ltorch -ltorch_cpu"
    sources = sorted((CSRC / "cpu").rglob("*.cpp")) + sorted((CSRC / "binding").rglob("*.cpp"))
    cuda = [s for folder in ("kernels", "launch") for s in sorted((CSRC / folder).rglob("*.c*")) if s.suffix != ".cuh"]
    cuda += [s for s in sources if s.name.startswith("cuda_")]
    sources = [s for s in sources if s not in cuda]
    lines = [RULES, f"cxx = {cxx}", f"cxxflags = {cxxflags}{' -DDECDEC_WITH_CUDA' if nvcc else ''}"]
    if nvcc:
        nvccflags = (f"{common} -ccbin {cxx} -Xcompiler -fPIC,-fvisibility=hidden --expt-relaxed-constexpr -DUSE_CUDA "
                     f"-DDECDEC_WITH_CUDA {' '.join(gencode_flags(nvcc))}")
        lines += [f"nvcc = {nvcc}", f"nvccflags = {nvccflags}"]
        # nvcc as the linker knows where its static runtime lies; the driver's library is found when the program runs.
        lines += [f"linker = {nvcc} -ccbin {cxx} -cudart static"]
        sources += cuda
    else:
        lines += [f"linker = {cxx}"]
    lines += [f"ldflags = {ldflags}"]
    built = []
    for source in sources:
        relative = source.relative_to(CSRC)
        built.append(escape(objects / relative) + ".o")
        lines.append(f"build {built[-1]}: {'nvcc' if source in cuda else 'cxx'} {escape(source)}")
        if relative.parts[0] == "cpu":
            # GCC 12 warns in its own headers of AVX-512.
            lines.append(f"  cxxflags = $cxxflags -march={cpu_arch} -Wno-psabi -Wno-maybe-uninitialized")
    lines.append(f"build {escape(output)}: link {' '.join(built)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Runs ninja in place of setuptools' own compiler; headers are tracked, so a rebuild compiles what changed."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = ROOT / "build" / "objects"  # not setuptools' own: an editable install throws that away
        objects.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja_file(output, objects))
        # Beside the interpreter first: a virtual environment need not be on PATH.
        ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if ninja is None:
            raise SystemExit("decdec: the build needs ninja: pip install ninja")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        status = subprocess.run([ninja, *jobs], cwd=objects).returncode
        if status:
            raise SystemExit(f"decdec: ninja ended with status {status}; the compiler's message is above")


if __name__ == "__main__":
    if platform.system() != "Linux":
        raise SystemExit(f"decdec: builds on Linux, not on {platform.system()}")
    setup(
        packages=find_packages(include=["decdec", "decdec.*"]),
        ext_modules=[Extension("decdec._ops", sources=[], py_limited_api=True)],
        cmdclass={"build_ext": NinjaBuild},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
