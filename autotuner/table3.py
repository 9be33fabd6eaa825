"""The paper's Table 3 from plans: n_tb^max/(k_qkv,k_o,k_gu,k_d) and the slow-down, one line a device and target, one
column a model."""

import argparse

import plan_report

from decdec.errors import run
from decdec.plan import load_plan


def cells(paths: list[str]) -> dict[tuple[str, float], dict[str, str]]:
    """``{(device, target): {model: cell}}``."""
    lines = {}
    for path in paths:
        plan = load_plan(path)
        for tuned in plan.tuned:
            device = f"{plan.device.name} {plan.device.sms} SMs" + " (simulated)" * plan.device.simulated
            for bits in sorted({choice.bits for choice in tuned.choices}):
                measured = tuned.measured_percent is not None
                slowdown = plan_report.percent(tuned.measured_percent if measured else tuned.predicted_percent)
                token = "" if tuned.token_percent is None else f", a token {plan_report.percent(tuned.token_percent)}"
                model = f"{plan.model} {plan.method} w{bits}, {tuned.objective}, {tuned.scope}"
                how = "measured" if measured else "predicted"
                cell = f"{plan_report.settings(tuned, bits)} {slowdown} {how}{token}"
                lines.setdefault((device, tuned.target_percent), {})[model] = cell
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plans", nargs="+", help="plan.json files written by tuner.py")
    lines = cells(parser.parse_args().plans)
    models = list(dict.fromkeys(model for line in lines.values() for model in line))
    print("| GPU | target | " + " | ".join(models) + " |")
    print("|---|---|" + "---|" * len(models))
    for (device, target), line in lines.items():
        print(f"| {device} | {target:g}% | " + " | ".join(line.get(model, "-") for model in models) + " |")


if __name__ == "__main__":
    run(main)
