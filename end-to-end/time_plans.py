"""Times plans of the autotuner on this runtime.

For each line of JSON {"plan": FILE, "target": PERCENT} read from stdin it prints one with "ms" a token under that plan
and "base_ms" without compensation, which is measured at most 20 seconds before; for {} the latter alone.

The model is loaded once. autotuner/tuner.py --timer runs this to meet end-to-end targets.
"""

import argparse
import json
import sys
import time

from benchmark import measure
from decdec import hub
from decdec.errors import UserError, run
from decdec.linear import Compensation
from decdec.plan import apply, load_plan
from random_model import give_residuals, random_decoder
from runtime import DTYPES, Runtime, device_and_dtype
from stepper import Stepper

RUNS = 3  # of base, then of plan; the medians count, which runs differ from by 0.3 % (H100)
BASE_HOLDS = 20.0  # seconds: then the base is measured again, since clocks may have changed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="DecDEC folder")
    parser.add_argument("--random-weights", metavar="NAME", help="shapes of a known model instead")
    parser.add_argument("--bits", type=float, default=3, help="of random weights (default 3)")
    parser.add_argument("--format", choices=("codebook", "uniform"), default="codebook", help="of random weights")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    parser.add_argument("--dtype", choices=DTYPES, help="default float16 on a GPU, float32 on the CPU")
    parser.add_argument("--prompt-tokens", type=int, default=16, metavar="N", help="default 16")
    parser.add_argument("--new-tokens", type=int, default=200, metavar="N",
                        help="decoded in each run (default 200)")
    return parser.parse_args()


def make_stepper(arguments: argparse.Namespace) -> Stepper:
    for name in ("prompt_tokens", "new_tokens"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected a positive number, got {getattr(arguments, name)}")
    if (arguments.model is None) == (arguments.random_weights is None):
        raise UserError("model: expected either --model FOLDER or --random-weights NAME")
    if arguments.model:
        return Runtime(arguments.model, device=arguments.device, dtype=arguments.dtype).stepper
    device, dtype = device_and_dtype(arguments.device, arguments.dtype)
    decoder = random_decoder(arguments.random_weights, arguments.bits, arguments.format, dtype, device)
    give_residuals(decoder)
    return Stepper(decoder)


class PlanTimer:
    """Times what lines ask for on ``stepper``."""

    def __init__(self, stepper: Stepper, prompt_tokens: int, new_tokens: int):
        self.stepper, self.tokens = stepper, (prompt_tokens, new_tokens)
        self.base_ms, self.base_at = 0.0, float("-inf")

    def answer(self, line: str) -> dict[str, float]:
        try:
            wanted = json.loads(line)
            plan, target = wanted.get("plan"), wanted.get("target")
        except (json.JSONDecodeError, AttributeError):
            raise UserError('stdin: expected lines such as {"plan": "plan.json", "target": 5}, '
                            f"got {line.strip()!r}") from None
        plan = None if plan is None else load_plan(plan)
        if time.monotonic() - self.base_at > BASE_HOLDS:
            hub.set_compensation(self.stepper.decoder, Compensation())
            self.base_ms, self.base_at = self._ms(), time.monotonic()
        times = {"base_ms": self.base_ms}
        if plan is not None:
            apply(plan, self.stepper.decoder, target)
            times["ms"] = self._ms()
        return times

    def _ms(self) -> float:
        self.stepper.settings_changed()
        return measure(self.stepper, *self.tokens, RUNS).ms_per_token


def main() -> None:
    arguments = parse_arguments()
    timer = PlanTimer(make_stepper(arguments), arguments.prompt_tokens, arguments.new_tokens)
    for line in sys.stdin:
        print(json.dumps(timer.answer(line)), flush=True)


if __name__ == "__main__":
    run(main)
