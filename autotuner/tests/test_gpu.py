"""What only a GPU can show: times are those of the SMs asked for, another process is noticed, a measured plan is followed, and
an end-to-end target is met by the runtime."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import run_profile
import torch
import tuner
from profiling import Profiler
from shapes import random_weights
from timings import Conditions, Timings
from transformers import AutoTokenizer, LlamaForCausalLM

from decdec import hub
from decdec.artifacts import read_quant_config
from decdec.plan import load_plan, this_device
from decdec.testing import quick_folder, run_script
from decdec.tiny import make_model

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
RUNTIME = Path(__file__).parents[2] / "end-to-end"
GU = random_weights("llama-3-8b", 3, "codebook").layers[2]


def test_fewer_sms_take_longer_and_all_are_there_again_afterwards():
    import gpu  # here, since it loads CUDA ops

    def base_us(sms):
        with gpu.limited_to(sms) as granted:
            assert sms is None or sms <= granted < sms + 8  # rounded up where the driver deals out eights
            return gpu.GpuTimer("float16", "exact").time(GU, 0, 0).us

    whole, some, few, whole_again = (base_us(sms) for sms in (None, 60, 16, None))
    assert few > 1.5 * some and some > 0.9 * whole
    assert whole_again == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize("selection", ["exact", "bucket"])
@pytest.mark.parametrize("form", ["codebook", "uniform"])
@pytest.mark.parametrize("residuals", [{}, {"residual_bits": 2, "nested": True}, {"residual_bits": 16}], ids=str)
def test_every_form_of_residuals_can_be_timed(form, selection, residuals):
    import gpu

    layer = replace(random_weights("llama-3-8b", 3, form).layers[1], d_in=2048, **residuals)
    timer = gpu.GpuTimer("bfloat16", selection)
    base, compensated = (timer.time(layer, 4, k_chunk).us for k_chunk in (0, 32))
    assert 1 < base < compensated < 1000


BUSY = """
import random, torch
ones = torch.ones(4096, 4096, device="cuda", dtype=torch.float16)
while True:
    for _ in range(random.randint(1, 20)):
        ones @ ones
    torch.cuda.synchronize()
    print("busy", flush=True)
"""


def test_another_process_on_the_gpu_is_told(tmp_path, capsys):
    import gpu

    class Counted(gpu.GpuTimer):
        calls = 0

        def time(self, *point):
            self.calls += 1
            return super().time(*point)

    # Small and slow: a sample of many calls in a row takes milliseconds, longer than the GPU leaves to one process.
    layer = replace(random_weights("llama-3-8b", 3, "codebook").layers[1], d_in=1024, d_out=1024)
    timer = Counted("float16", "exact")
    here = this_device()
    timings = Timings((layer,), Conditions(here.name, here.sms, gpu.library_hash(), "float16", "exact"), [])
    profiler = Profiler(timings, timer, tmp_path / "rows.jsonl")
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "busy\n"
            for k_chunk in (200, 300, 400, 500):
                profiler.measure(layer, 1, k_chunk)
        finally:
            other.kill()
    profiler.warn_if_noisy()
    assert timer.calls > profiler.taken == 4 and "something else uses this GPU" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny model at 3 bits, with its tokenizer."""
    original = make_model(tmp_path_factory.mktemp("models") / "tiny")
    made = quick_folder(LlamaForCausalLM.from_pretrained(original), original.parent / "tiny-w3")
    AutoTokenizer.from_pretrained(original).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def profile(folder) -> Path:
    """Times of the tiny model's layers on this GPU, and its plan in the folder; the layers are so small that anything fetched shows."""
    rows = folder.parent / "rows.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        for script, *arguments in ((run_profile, "--target", 60, 200), (tuner, "--target", 200, "--objective", "paper")):
            patch.setattr(sys, "argv", [script.__name__, *map(str, (folder, "--profile", rows, *arguments))])
            script.main()
    return rows


@pytest.fixture
def plan(folder, profile):
    made = load_plan(folder / "plan.json", read_quant_config(folder), this_device())
    assert any(choice.k_chunk for choice in made.at().choices) and 0 < made.at().measured_percent <= 200
    return made


def test_a_measured_plan_is_followed(folder, plan):
    model = hub.load(folder, torch.float16).to("cuda")
    hub.set_compensation(model, "plan")
    for layer in hub.compensated_layers(model).values():
        choice = plan.at().choice(layer.kind, layer.bits)
        used = layer.compensation
        assert (used.k_chunk, used.selection) == (choice.k_chunk, "exact") and used.n_tb == choice.n_tb
    assert model(torch.arange(1, 2, device="cuda")[None]).logits.isfinite().all()


def test_generate_follows_the_folders_plan_and_leaves_that_of_another_gpu_aside(folder, plan, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "tiny-w3")
    generate = RUNTIME / "generate.py", "--model", folder, "--prompt", "Hello", "--max-new-tokens", 4
    assert f"following {folder / 'plan.json'}: qkv 3-bit k_chunk" in run_script(*generate).stderr
    content = json.loads((folder / "plan.json").read_text())
    content["device"]["sms"] += 1
    (folder / "plan.json").write_text(json.dumps(content))
    assert "not compensating: " in (said := run_script(*generate).stderr) and "tuned for" in said


def test_the_runtime_meets_an_end_to_end_target(call, folder, profile, tmp_path):
    timer = f"{sys.executable} {RUNTIME / 'time_plans.py'} --model {folder} --new-tokens 32"
    call(tuner, folder, "--profile", profile, "--target", 60, "--scope", "end-to-end", "--objective", "paper", "--timer", timer,
         "--out", tmp_path / "plan.json")
    tuned = load_plan(tmp_path / "plan.json").at()
    assert 0 < tuned.measured_percent <= 60 and tuned.rest_us > 0
