"""Times the setup stage on random weights of a known model's shape, and its memory; two sizes are run, the whole is scaled.

The time does not depend on the values. A model of each number of blocks of --blocks is written to --scratch, and every step
does its whole work on both: what the second takes more is a block's share, the rest comes once. CPU memory that a few blocks do
not show in proportion is counted: SqueezeLLM's block inputs that wait, and all residuals when the cheatsheet is written. With one
number, that of the whole model, nothing is scaled. One JSON line a step is printed and appended to --out: seconds, peak bytes of
the process (what it mapped of files counted in) and of the GPU.
"""

import argparse
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from decdec.errors import UserError, run
from decdec.files import append_row, write_json
from decdec.sizes import NAMED
from decdec.tiny import save_tokenizer

import squeezellm
from cheatsheet import make_cheatsheet
from parts import stream_tensors
from quantize import METHODS, quantize
from thresholds import make_thresholds

STEPS = ("awq", "gptq", "squeezellm", "cheatsheet", "thresholds")
HIDDEN_BYTES = squeezellm.HIDDEN_BYTES
MODELS = NAMED | {"tiny": (256, 512, 2, 1, 4, 512)}


def write_model(folder: Path, name: str, blocks: int) -> int:
    """Write a Llama of that shape with ``blocks`` blocks of random float16 weights, a file a block; returns a block's bytes.

    Files that lie in ``folder`` already, of another number of blocks, are kept. All matrices come from one row of random values,
    each from a place of its own, so that no two are alike: to draw and copy as many as a large model has takes longer than a step.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, mlp, heads, kv_heads, _, vocabulary = MODELS[name]
    config = LlamaConfig(hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=kv_heads,
                         head_dim=hidden // heads, num_hidden_layers=blocks, vocab_size=vocabulary, dtype="float16",
                         architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config, dtype=torch.float16).state_dict()
    files: dict[str, list[str]] = {}
    for key in state:
        parts = key.split(".")
        files.setdefault(f"block-{int(parts[2]):02d}.safetensors" if parts[1] == "layers" else "rest.safetensors", []).append(key)
    folder.mkdir(exist_ok=True)
    missing = {file: keys for file, keys in files.items() if not (folder / file).exists()}
    if missing:
        sizes = [tensor.numel() for tensor in state.values()]
        values = torch.randn(max(sizes) + len(sizes), device="cuda" if torch.cuda.is_available() else "cpu", dtype=torch.float16)
        values = values.mul_(0.02).cpu()
        places = {key: place for place, key in enumerate(state)}
    for file, keys in missing.items():
        stream_tensors(folder / file, {key: partial(_weight, state[key].shape, values[places[key]:]) for key in keys})
    write_json(folder / "model.safetensors.index.json", {"weight_map": {key: file for file, keys in files.items() for key in keys}})
    config.save_pretrained(folder)
    save_tokenizer(folder)
    return (folder / "block-00.safetensors").stat().st_size


def _weight(shape: torch.Size, values: torch.Tensor) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float16) if len(shape) == 1 else values[:shape.numel()].view(shape)


class PeakMemory:
    """While it lasts, samples the resident bytes of this process; ``bytes`` is the largest found, files it mapped counted in."""

    def __enter__(self) -> "PeakMemory":
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while True:
            self.bytes = max(self.bytes, int(Path("/proc/self/statm").read_text().split()[1]) * page)
            if self._done.wait(0.01):
                return

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def measured(work: Callable[[], object], cuda: bool) -> tuple[float, float, float]:
    """Seconds, and peak gigabytes of this process and of the fullest GPU, of one piece of work."""
    devices = range(torch.cuda.device_count()) if cuda else ()
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with PeakMemory() as host:
        work()
    seconds = time.perf_counter() - start
    return seconds, host.bytes / 1e9, max(map(torch.cuda.max_memory_allocated, devices), default=0) / 1e9


def step_of(step: str, source: Path, out: Path, bits: int, calibration: dict, device: str) -> Callable[[], object]:
    """The work of one step on the model ``source``; cheatsheet and thresholds need its folder ``out``."""
    if step in METHODS:
        return lambda: quantize(str(source), step, bits, str(out), device=device, **calibration)
    if step == "cheatsheet":
        return lambda: make_cheatsheet(out, str(source), device=device)
    return lambda: make_thresholds(out, str(source), device=device, **calibration)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random-weights", default="llama-3-8b", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 3], metavar="N",
                        help="blocks of the two models that are timed (default 1 3), or all blocks of the whole one")
    parser.add_argument("--steps", nargs="+", default=list(STEPS), help=", ".join(STEPS))
    parser.add_argument("--bits", type=int, default=3, help="2, 3 or 4 (default %(default)s)")
    parser.add_argument("--samples", type=int, default=100, help="calibration samples (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens a sample (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--scratch", metavar="FOLDER", help="where the models are written (default the system's temporary folder)")
    parser.add_argument("--out", default="decdec_setup/results/quantize.jsonl", help="file of rows (default %(default)s)")
    args = parser.parse_args()
    if args.random_weights not in MODELS or set(args.steps) - set(STEPS):
        raise UserError(f"expected a model of {', '.join(MODELS)} and steps of {', '.join(STEPS)}")
    few, many, whole = args.blocks[0], args.blocks[-1], MODELS[args.random_weights][4]
    if not (len(args.blocks) == 2 and 0 < few < many) and args.blocks != [whole]:
        raise UserError(f"blocks: expected two positive numbers, the smaller first, or all {whole}, got {args.blocks}")
    cuda = args.device.startswith("cuda")
    calibration = {"text": "pydoc", "samples": args.samples, "length": args.length}
    steps = [step for step in STEPS if step in args.steps]
    if not set(steps) & set(METHODS):
        steps.insert(0, "rtn")  # whose folder the others read
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        if cuda:  # what the first use of every library takes is no block's share
            write_model(Path(scratch, "tiny"), "tiny", 1)
            for step in steps:
                step_of(step, Path(scratch, "tiny"), Path(scratch, "out"), args.bits, {"text": "pydoc", "samples": 2, "length": 64},
                        args.device)()
        block_bytes = write_model(Path(scratch, str(many)), args.random_weights, many)
        if few < many:
            Path(scratch, str(few)).mkdir()
            for file in Path(scratch, str(many)).glob("*.safetensors"):
                os.link(file, Path(scratch, str(few), file.name))
            write_model(Path(scratch, str(few)), args.random_weights, few)
        rest_bytes = Path(scratch, str(many), "rest.safetensors").stat().st_size
        for step in steps:
            found = []
            for blocks in args.blocks:
                # Block inputs wait or are made again as in the whole model.
                squeezellm.HIDDEN_BYTES = HIDDEN_BYTES * blocks // whole
                source, out = Path(scratch, str(blocks)), Path(scratch, f"{blocks}-quantized")
                found.append(measured(step_of(step, source, out, args.bits, calibration, args.device), cuda))
                seconds, host, _ = found[-1]
                print(f"{step} of {blocks} blocks: {seconds:.1f} s, {host:.2f} GB of CPU memory", file=sys.stderr, flush=True)
            if step in args.steps:
                row = scaled(args, step, found, block_bytes, rest_bytes)
                append_row(args.out, row)
                print(f"{step}: {row['seconds_a_block']} s a block; scaled to {whole} blocks "
                      f"{row['model_minutes_scaled']} minutes, {row['model_peak_host_gb_scaled']} GB of CPU memory", flush=True)


def scaled(args: argparse.Namespace, step: str, found: list[tuple[float, float, float]], block_bytes: int,
           rest_bytes: int) -> dict:
    """The row of a step from what :func:`measured` gave for every size."""
    hidden, blocks, many = MODELS[args.random_weights][0], MODELS[args.random_weights][4], args.blocks[-1]
    seconds, host, gpu = zip(*found)

    def waiting(count: int) -> float:
        size = 2 * args.samples * args.length * hidden
        return squeezellm.waiting_bytes(count, size, HIDDEN_BYTES * count // blocks) / 1e9 if step == "squeezellm" else 0.0

    rest = [peak - waiting(count) for peak, count in zip(host, args.blocks)]
    if len(found) == 2:
        each, rest_each = ((part[1] - part[0]) / (many - args.blocks[0]) for part in (seconds, rest))
    else:
        each, rest_each = seconds[0] / many, 0.0
    # All residuals, a quarter of the weights' bytes, are in memory at the end; a few blocks' hide behind the layer at work.
    least = block_bytes / 4e9 if step == "cheatsheet" else 0.0
    cuda = args.device.startswith("cuda")
    return {"bench": "setup", "step": step, "model": args.random_weights, "weights": "random", "bits": args.bits,
            "samples": args.samples, "length": args.length, "timed_blocks": args.blocks, "model_blocks": blocks,
            "seconds": [round(part, 2) for part in seconds], "seconds_a_block": round(each, 3),
            "model_minutes_scaled": round((seconds[-1] + each * (blocks - many)) / 60, 2),
            "peak_host_gb": [round(part, 2) for part in host],
            "model_peak_host_gb_scaled": round(rest[-1] + max(rest_each, least) * (blocks - many) + waiting(blocks), 2),
            "peak_gpu_gb": round(gpu[-1], 2), "model_gb": round((rest_bytes + blocks * block_bytes) / 1e9, 2),
            "block_gb": round(block_bytes / 1e9, 2),
            "device": torch.cuda.get_device_name() if cuda else f"cpu {platform.machine()}",
            "gpus": torch.cuda.device_count() if cuda else 0, "cores": os.cpu_count(), "torch": torch.__version__}


if __name__ == "__main__":
    run(main)
