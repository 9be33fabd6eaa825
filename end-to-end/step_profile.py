"""Where the time of a token goes."""

import re
from collections import defaultdict

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from sampling import Sampling
from stepper import Stepper

TOKENS = 8  # that are seen, after as many that are not
# Which layer a GEMV is, from how many came since attention or the gate.
_LAYERS = {("attend_kernel", 1): "o", ("attend_kernel", 2): "gu", ("gate_kernel", 1): "d"}


def profile(stepper: Stepper, prompt: Tensor, sampling: Sampling) -> list[dict]:
    """Where the time of a token after ``prompt`` int64 ``(T,)`` goes, most first: ``what``, how often in a token, microseconds.

    On a GPU by kernel, on the CPU by operator.

    A kernel may start early, while the ones ahead of it still run, so each is given the time from the end of the one
    before it to its own: what it adds to a token. These times sum up to the whole.
    """
    stepper.begin(len(prompt) + 2 * TOKENS, sampling)
    stepper.prefill(prompt)
    for _ in range(TOKENS):
        stepper.advance()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if stepper.on_gpu else ProfilerActivity.CPU]) as seen:
        for _ in range(TOKENS):
            stepper.advance()
        if stepper.on_gpu:
            torch.cuda.synchronize()
    times = _by_kernel(seen) if stepper.on_gpu else {
        event.key: [event.self_cpu_time_total / event.count] * event.count for event in seen.key_averages()}
    return [{"what": name, "count": round(len(each) / TOKENS, 2), "us_a_token": round(sum(each) / TOKENS, 1)}
            for name, each in sorted(times.items(), key=lambda item: -sum(item[1])) if sum(each)]


def table(rows: list[dict]) -> str:
    """A profile as a person reads it."""
    total = sum(row["us_a_token"] for row in rows)
    lines = [f"{'us a token':>10} {'share':>6} {'count':>6} {'us each':>8}  what"]
    lines += [f"{row['us_a_token']:10.1f} {row['us_a_token'] / total:6.1%} {row['count']:6.1f} "
              f"{row['us_a_token'] / row['count']:8.2f}  {row['what']}" for row in rows]
    return "\n".join([*lines, f"{total:10.1f}  in all"])


def _by_kernel(seen: torch.profiler.profile) -> dict[str, list[float]]:
    """Microseconds that every kernel added, by its name and, of the linear layers, which one it is."""
    kernels = sorted((e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA),
                     key=lambda e: e.time_range.end)
    times, before, anchor, count = defaultdict(list), None, "", 0
    for kernel in kernels:
        name = _short(kernel.name)
        if name in ("attend_kernel", "gate_kernel"):
            anchor, count = name, 0
        if name == "gemv_kernel":
            count += 1
            name = f"gemv_kernel, {_LAYERS.get((anchor, count), 'qkv')}"
        if before is not None:
            times[name].append(kernel.time_range.end - before)
        before = kernel.time_range.end
    return times


def _short(name: str) -> str:
    """The last part of a kernel's name without its namespaces, template and arguments."""
    name = name.replace("(anonymous namespace)::", "")
    found = re.match(r"(?:void )?((?:\w+::)*)(\w+)", name)
    return found[2] if found else name
