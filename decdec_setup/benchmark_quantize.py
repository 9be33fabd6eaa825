"""Times quantization on random weights of a known model's shape: a few blocks are done, the model's time is scaled from them.

The time does not depend on the values. One JSON line for each step is printed and appended to --out: seconds a block, what
does not repeat with the blocks, and the whole model's seconds and bytes as computed from these.
"""

import argparse
import platform
import resource
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from decdec.artifacts import QuantConfig
from decdec.errors import UserError, run
from decdec.files import append_row, write_json
from decdec.residual import pack_layer

import awq
import gptq
import squeezellm
from base_model import BaseModel
from blocks import BlockRunner, block_linears
from parts import save_tensors
from quantized_blocks import QuantizedBlocks
from thresholds import statistics
from uniform import pack_uniform

# hidden size, MLP width, query heads, key-value heads, blocks, vocabulary; head size 128
MODELS = {"llama-3-8b": (4096, 14336, 32, 8, 32, 128256), "llama-3-70b": (8192, 28672, 64, 8, 80, 128256),
          "phi-3-medium": (5120, 17920, 40, 10, 40, 32064), "tiny": (256, 512, 2, 1, 4, 512)}
STEPS = ("awq", "gptq", "squeezellm", "cheatsheet", "thresholds")
GROUP_SIZE = 128


def random_model(name: str, blocks: int) -> nn.Module:
    """A Llama of that shape with ``blocks`` blocks of random float16 weights, on the CPU."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, mlp, heads, kv_heads, _, vocabulary = MODELS[name]
    config = LlamaConfig(hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=kv_heads,
                         head_dim=hidden // heads, num_hidden_layers=blocks, vocab_size=vocabulary)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    return model.cpu().eval()


class Timer:
    """Seconds since it was last asked; work on a GPU is waited for."""

    def __init__(self, device: str):
        self.device, self.last = device, time.perf_counter()

    def lap(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def time_step(step: str, base: BaseModel, runner: BlockRunner, bits: int, scratch: Path) -> tuple[float, float]:
    """``(seconds a block, seconds once a model)`` of one step; the first block is left out of the mean if there are several."""
    count, timer = len(base.blocks), Timer(str(runner.device))
    every, widths = set(range(count)), [bits] * count
    if step == "thresholds":
        folder = _rounded_folder(base, bits, scratch, runner.device)
        timer.lap()
        runner.embed()
        once = timer.lap()
        for _ in statistics(runner, {}, folder, every):
            pass
        return (timer.lap() - once) / count, once
    if step == "cheatsheet":
        laps = []
        for index in range(count):
            block = runner.copy_block(index)
            for name, module in block_linears(runner, index, block).items():
                pack_layer((module.weight.detach() - module.weight.detach().bfloat16().float()).cpu(), 4)
            laps.append(timer.lap())
    elif step == "squeezellm":
        # Forwards over all blocks and the loss come before the first block is yielded; another run without work on weights
        # parts them from what a block costs.
        laps = [timer.lap() for _ in squeezellm.quantize_blocks(runner, widths, every)]
        forward = _forward_seconds(runner, timer)
        return _steady(laps[1:] or laps) + forward, max(0.0, laps[0] - _steady(laps[1:] or laps) - forward * count)
    else:
        make = awq.quantize_blocks(runner, widths, GROUP_SIZE, every) if step == "awq" \
            else gptq.quantize_blocks(runner, widths, GROUP_SIZE, every, lambda index: {})
        laps = [timer.lap() for _ in make]
    return _steady(laps), max(0.0, laps[0] - _steady(laps))


def _steady(laps: list[float]) -> float:
    return min(laps[1:] or laps)


def _forward_seconds(runner: BlockRunner, timer: Timer) -> float:
    """Seconds of one pass of the calibration text through one block."""
    with torch.no_grad():
        hidden = runner.embed()
        timer.lap()
        block = runner.copy_block(0)
        for state in hidden:
            runner.call(0, block, state).to(runner.dtype)
    return timer.lap()


def _rounded_folder(base: BaseModel, bits: int, scratch: Path, device: torch.device) -> QuantizedBlocks:
    """A folder of the model's linear layers, rounded to nearest."""
    tensors = {}
    for name in base.linears():
        tensors |= pack_uniform(name, base.tensor(f"{name}.weight").to(device, torch.float32), bits, GROUP_SIZE)
    save_tensors(scratch / "model.safetensors", tensors)
    quant = QuantConfig("rtn", "uniform", bits, GROUP_SIZE, "random", "none")
    write_json(scratch / "config.json", {"quantization_config": quant.to_dict()})
    return QuantizedBlocks(scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random-weights", default="llama-3-8b", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--blocks", type=int, default=2, help="blocks that are timed (default %(default)s)")
    parser.add_argument("--steps", nargs="+", default=list(STEPS), help=", ".join(STEPS))
    parser.add_argument("--bits", type=int, default=3, help="2, 3 or 4 (default %(default)s)")
    parser.add_argument("--samples", type=int, default=100, help="calibration samples (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens a sample (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--out", default="decdec_setup/results/quantize.jsonl", help="file of rows (default %(default)s)")
    args = parser.parse_args()
    if args.random_weights not in MODELS or set(args.steps) - set(STEPS):
        raise UserError(f"expected a model of {', '.join(MODELS)} and steps of {', '.join(STEPS)}")
    if args.blocks < 1:
        raise UserError(f"blocks: expected a positive number, got {args.blocks}")
    blocks, vocabulary = MODELS[args.random_weights][4:]
    base = BaseModel.whole(random_model(args.random_weights, args.blocks))
    tokens = torch.randint(0, vocabulary, (args.samples, args.length), generator=torch.Generator().manual_seed(0))
    runner = BlockRunner(base.model, tokens, args.device, base.block)
    for step in args.steps:
        with tempfile.TemporaryDirectory() as scratch:
            per_block, once = time_step(step, base, runner, args.bits, Path(scratch))
        cuda = args.device.startswith("cuda")
        row = {"bench": "quantize", "step": step, "model": args.random_weights, "weights": "random", "bits": args.bits,
               "samples": args.samples, "length": args.length, "timed_blocks": args.blocks, "model_blocks": blocks,
               "seconds_a_block": round(per_block, 3), "seconds_once": round(once, 3),
               "model_minutes_scaled": round((per_block * blocks + once) / 60, 2),
               "peak_host_gb_of_timed_run": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
               "peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
               "device": torch.cuda.get_device_name() if cuda else f"cpu {platform.machine()}", "torch": torch.__version__}
        append_row(args.out, row)
        print(f"{step}: {row['seconds_a_block']} s a block, {row['model_minutes_scaled']} minutes for {blocks} blocks (scaled)",
              flush=True)


if __name__ == "__main__":
    run(main)
