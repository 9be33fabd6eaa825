"""SIGKILL at random moments, and run again: the files are those of an uninterrupted run, and nothing else is left.

By hand, with more kills: ``KILLS=20 pytest decdec_setup/tests/test_kills.py``; ``METHODS`` chooses among awq, gptq, rtn, squeezellm, mixed.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from decdec.testing import run_script

ROOM = Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", "5"))
WORK = """
import os, random, signal, sys, time
from pathlib import Path
import torch, transformers
import decdec.hub  # all that a child needs is imported before it is forked
from cheatsheet import make_cheatsheet
from mixed_precision import make_bit_map
from quantize import quantize
from thresholds import make_thresholds

source, out, method, kills, longest = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), float(sys.argv[5])
text = {"text": "pydoc", "samples": 3, "length": 64}

def work():
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

random.seed(method)
torch.set_num_threads(1)
for kill in [*[True] * kills, False]:
    start = time.monotonic()
    child = os.fork()  # before torch has started any thread
    if not child:
        work()
        os._exit(0)
    if kill:
        time.sleep(random.uniform(0.1, longest))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(f"{time.monotonic() - start:.1f} s, status {status}", sum(1 for path in out.rglob("*.safetensors")), "parts or more", flush=True)
assert status == 0
"""


@pytest.mark.parametrize("method", os.environ.get("METHODS", "gptq squeezellm").split())
def test_killed_at_random_and_resumed_the_files_are_the_same(tiny, tmp_path, method):
    source, script = deeper(tiny, tmp_path), tmp_path / "work.py"
    script.write_text(WORK)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    seconds = 0.0
    for out, kills in ((whole, 0), (killed, KILLS)):
        result = run_script(script, source, out, method, kills, seconds, env={"PYTHONPATH": str(ROOM), "OMP_NUM_THREADS": "1"})
        print(result.stdout)
        assert result.returncode == 0, result.stderr[-2000:]
        seconds = 0.3 * float(result.stdout.split()[0])
    # The model card names the folder.
    names = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.name != "README.md"}
    for name in names:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    left = {path.relative_to(killed) for path in killed.rglob("*") if path.is_file() and path.name != "README.md"} - names
    # A kill may leave the temporary file that was being written.
    assert all(path.name.startswith(".") for path in left) and not list(killed.rglob("*.parts"))


def deeper(tiny, tmp_path):
    """The tiny model with six blocks."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tiny)
    config.num_hidden_layers = 6
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / "deep")
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "deep")
    return tmp_path / "deep"
