"""SIGKILL at random moments, and run again: the files are those of an uninterrupted run, and nothing else is left.

By hand, with more kills: ``KILLS=20 pytest decdec_setup/tests/test_kills.py``; ``METHODS`` chooses among awq, gptq, rtn,
squeezellm, mixed.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from decdec.testing import run_script

ROOM = Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", "3"))
WORK = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch, transformers
import decdec.hub  # all that a child needs is imported before it is forked
import mixed_precision
from cheatsheet import make_cheatsheet
from mixed_precision import make_bit_map
from quantize import quantize
from thresholds import make_thresholds

source, scratch, method, kills = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
text = {"text": "pydoc", "samples": 3, "length": 64}

def work(out):
    if method == "mixed":
        low, high, bits = out / "low", out / "high", out / "map.json"
        for folder, b in ((low, 3), (high, 4)):
            quantize(source, "rtn", b, str(folder))
        make_bit_map(source, low, high, bits, **text)
        quantize(source, "rtn", 3.5, str(out / "mixed"), bit_map=str(bits), reuse=[low, high])
    else:
        quantize(source, method, 3, str(out), **text)
        make_cheatsheet(out)
        make_thresholds(out, **text)

def run(out, seconds=float("inf")):
    "Whether the work got done within `seconds`; a fork, before torch has started any thread."
    child = os.fork()
    if not child:
        work(out)
        os._exit(0)
    end = time.monotonic() + seconds
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            found = os.waitpid(child, 0)
            break
        time.sleep(0.005)
    assert found[1] in (0, signal.SIGKILL), found
    return found[1] == 0

def files(out):
    # The model card names the folder; a kill may leave the hidden temporary file that was being written.
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*")
            if path.is_file() and path.name != "README.md" and not path.name.startswith(".")}

random.seed(method)
mixed_precision.SAVE_SECONDS = 0
torch.set_num_threads(1)
whole, out = scratch / "whole", scratch / "killed"
start = time.monotonic()
assert run(whole)
patience = (time.monotonic() - start) / 5
killed = ended = progress = 0
while killed < kills or not ended:
    if run(out, random.uniform(0, patience) if killed < kills else float("inf")):
        assert files(out) == files(whole) and not list(out.rglob("*.parts"))
        ended, progress = ended + 1, 0
        shutil.rmtree(out)
        patience /= 1.2
    else:
        killed += 1
        before, progress = progress, sum(1 for _ in out.rglob("*.safetensors"))
        patience *= 1 if progress > before else 1.2  # too short to get anywhere, on this machine
print(method, killed, "kills,", ended, "times to the end, the same files each time")
"""


@pytest.mark.parametrize("method", os.environ.get("METHODS", "gptq squeezellm").split())
def test_killed_at_random_and_resumed_the_files_are_the_same(tiny, tmp_path, method):
    script = tmp_path / "work.py"
    script.write_text(WORK)
    paths = os.pathsep.join(filter(None, (str(ROOM), os.environ.get("PYTHONPATH"))))
    result = run_script(script, deeper(tiny, tmp_path), tmp_path, method, KILLS, env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-2000:]
    print(result.stdout)


def deeper(tiny, tmp_path):
    """The tiny model with six blocks."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tiny)
    config.num_hidden_layers = 6
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / "deep")
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "deep")
    return tmp_path / "deep"
