"""How a GEMV is cut (launch/plan.cu, plain host code): on every supported GPU's shared memory, without such a GPU."""

import os
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
# SMs, shared memory of an SM and of a block in bytes: H100, A100, and GPUs of 99 KB a block (RTX 4090, RTX 4070S, RTX 4050M)
DEVICES = {"H100": (132, 233472, 232448), "A100": (108, 167936, 166912), "4090": (128, 102400, 101376),
           "4070S": (56, 102400, 101376), "4050M": (20, 102400, 101376)}
# d_in, d_out: qkv, o, gu, d of Llama-3-8B and of 70B, SmolLM2's, and ragged ones
LAYERS = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (8192, 57344), (28672, 8192), (576, 3072), (63, 1), (2500, 577)]
PROGRAM = r"""
#include <cstdio>
#include "launch/plan.h"
using namespace decdec::cuda;
int main() {
  int sms, per_sm, per_block, format, bits, d_in, d_out, group, batch, n_tb;
  while (scanf("%d %d %d %d %d %d %d %d %d %d", &sms, &per_sm, &per_block, &format, &bits, &d_in, &d_out, &group, &batch, &n_tb) == 10) {
    Weights w{};
    w.d_in = d_in, w.d_out = d_out, w.group_size = group;
    const auto plan = plan_gemv({sms, per_sm, per_block, true}, Format(format), bits, w, batch, n_tb);
    if (!plan) printf("none\n");
    else printf("%d %d %d %d %d %d %d\n", plan->blocks, plan->tiles_each, plan->tiles_more, plan->panels, plan->panel_units, plan->generic, plan->bytes);
  }
}
"""


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """``plans(cases)``: for each (device, format, bits, layer, group_size, batch, n_tb) the plan's numbers, or None."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "main.cpp").write_text(PROGRAM)
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-std=c++20", "-O1", f"-I{CSRC}", "main.cpp", "-x", "c++", CSRC / "launch" / "plan.cu", "-o", "plan"],
                   cwd=folder, check=True)

    def run(cases):
        lines = "".join(" ".join(map(str, (*DEVICES[device], form, bits, *layer, group, batch, n_tb))) + "\n"
                        for device, form, bits, layer, group, batch, n_tb in cases)
        out = subprocess.run([folder / "plan"], input=lines, capture_output=True, text=True, check=True).stdout.splitlines()
        return [None if line == "none" else tuple(map(int, line.split())) for line in out]

    return run


@pytest.mark.parametrize("device", DEVICES)
def test_every_layer_is_cut_to_fit(plans, device):
    cases = [(device, form, bits, layer, 128, batch, n_tb) for form in (0, 1) for bits in (2, 3, 4) for layer in LAYERS
             for batch in range(1, 9) for n_tb in (0, 8, 300)]
    for case, plan in zip(cases, plans(cases), strict=True):
        _, form, _, (d_in, d_out), group, batch, _ = case
        if plan is None:  # the launcher halves the rows, down to one
            assert batch > 1 and DEVICES[device][2] < 128 * 1024, case
            continue
        blocks, each, more, panels, panel_units, generic, size = plan
        assert blocks * each + more == -(-d_out // 16) and 0 <= more < blocks, case
        assert panels * panel_units * 64 >= d_in > (panels - 1) * panel_units * 64, case
        assert generic == (form == 1 and d_out % 2) and (generic or size <= DEVICES[device][2]), case
