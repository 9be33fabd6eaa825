"""Choose n_tb and k_chunk for each kind of layer so that decoding slows down by no more than asked: plan.json.

By default the settings are those predicted to remove most loss in the time allowed; --objective paper is the paper's
two phases. Needs a profile of run_profile.py. On the GPU of the profile (or in simulation) the choice is refined by
further measurements and then measured afresh; elsewhere it rests on the saved rows.
"""

import argparse
import platform
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import decide
import gains as gains_of
import plan_report
import session as sessions
import torch
from decide import Target
from phases import Setting
from profiling import Profiler
from session import Session
from settle import Settled, settle
from settle_token import exposed_by_kind, settle_token
from shapes import Layer, Shapes
from timings import Timings, read_profile
from token_timer import TokenTimer

from decdec import plan
from decdec.errors import UserError, run
from decdec.files import append_row
from decdec.plan import Choice, Plan, Tuned


def choices(settled: Settled) -> tuple[Choice, ...]:
    return tuple(Choice(layer.kind, layer.bits, layer.d_in, layer.d_out, layer.count, setting.n_tb, setting.k_chunk,
                        settled.base[layer], settled.predicted[layer], settled.measured and settled.measured[layer],
                        layer.block)
                 for layer, setting in settled.settings.items())


def tune(shapes: Shapes, session: Session, rows: list[dict], targets: list[Target], gains: tuple | None,
         profile: str, token_timer: TokenTimer | None = None) -> Plan:
    """Settle every target and put the results together; ``gains`` as :func:`gains.read_gains` returns them."""
    timings = Timings(shapes.layers, session.conditions, rows)
    profiler = session.timer and Profiler(timings, session.timer, profile)
    by_layer, unit = gains or (None, None)
    n_limit = max(1, session.device.sms // 2)
    objective = "paper" if gains is None else "quality"
    if any(layer.block is not None for layer in shapes.layers):
        objective += " by block"

    def decision(table: Timings, target: Target) -> dict[Layer, Setting]:
        return decide.decide(table, target, by_layer, n_limit)

    def tuned_of(target: Target, settled: Settled) -> Tuned:
        gain = gains and float(sum(by_layer[layer][setting.k_chunk] for layer, setting in settled.settings.items()))
        return Tuned(target.percent, target.scope, objective, settled.predicted_percent, settled.measured_percent,
                     target.rest_us, gain, choices(settled))

    def plan_of(tuned: list[Tuned]) -> Plan:
        return Plan(shapes.name, shapes.method, shapes.weights_hash, session.device, session.conditions.selection,
                    session.rates.dram_gb_s, session.rates.link_gb_s, unit, versions, tuple(tuned),
                    any(layer.repair_rank for layer in shapes.layers))

    versions = {"torch": torch.__version__, "python": platform.python_version(), "library": session.conditions.library}
    tuned, exposed, ratio = [], None, 1.0
    for target in targets:
        def token_percent(settled: Settled, target: Target = target) -> float:
            return token_timer.slowdown_percent(plan_of([tuned_of(target, settled)]))

        if token_timer is None or target.scope == "kernel":
            settled = settle(timings, profiler, decision, target, afresh=not session.device.simulated)
        else:
            if exposed is None:
                exposed = exposed_by_kind(timings, target, n_limit, token_percent)
                for (kind, bits), us in exposed.items():
                    print(f"in a token a compensated {kind} of {bits} bits takes {us:+.1f} us beyond its kernel",
                          file=sys.stderr)
            settled, ratio = settle_token(timings, profiler, decision, target, token_percent, exposed, ratio)
        tuned.append(tuned_of(target, settled))
        if token_timer is not None and target.scope == "kernel":
            tuned[-1] = replace(tuned[-1], token_percent=token_percent(settled))
        if not any(setting.k_chunk for setting in settled.settings.values()):
            print(f"target {target.percent:g} %: nothing keeps it, so nothing is compensated", file=sys.stderr)
    if profiler is not None:
        profiler.warn_if_noisy()
    return plan_of(tuned)


def rest_us(arguments: argparse.Namespace, token_ms: float | None, shapes: Shapes, session: Session,
            base_us: float) -> float:
    """Time of a token outside the linear layers; 0 where it is not known and the target does not depend on it."""
    if token_ms is None:
        if session.device.simulated:  # the output head is nearly all of it in a decoder that runs as one graph
            return shapes.head_bytes / (session.rates.dram_gb_s * 1e3)
        if arguments.scope == "kernel":
            return 0.0
        raise UserError("token-ms: an end-to-end target needs a runtime that measures it (--timer), or the "
                        "milliseconds of a token without compensation (generate.py --k-chunk 0 prints tokens a second)")
    rest = 1e3 * token_ms - base_us
    if rest < 0:
        raise UserError(f"token-ms: the linear layers alone take {base_us / 1e3:.2f} ms a token, got {token_ms:g}")
    return rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sessions.add_arguments(parser)
    parser.add_argument("--sms", type=int, help="tune for so many SMs of the GPU")
    parser.add_argument("--saved", action="store_true",
                        help="tune from the saved rows alone, for the GPU they were measured on")
    parser.add_argument("--target", type=float, nargs="+", default=[5.0], metavar="PERCENT",
                        help="allowed slow-downs (default 5)")
    parser.add_argument("--scope", choices=decide.SCOPES, default="kernel",
                        help="slow-down of the linear layers' kernels (default, the paper's) or of a whole token")
    parser.add_argument("--token-ms", type=float, help="time of a token without compensation, for the end-to-end scope")
    parser.add_argument("--timer", metavar="COMMAND",
                        help="a runtime such as 'python end-to-end/time_plans.py --model FOLDER': end-to-end targets "
                             "are met as it measures them; under kernel targets it tells what a token takes")
    parser.add_argument("--objective", choices=decide.OBJECTIVES,
                        help="quality (default where the folder has calibration data; random weights are taken to "
                             "have normal inputs) or the paper's phases")
    parser.add_argument("--each-block", action="store_true",
                        help="choose for every block by itself; by predicted quality only")
    parser.add_argument("--out", help=f"plan to write (default {plan.PLAN} in the folder)")
    parser.add_argument("--rows", metavar="FILE", help="also append one JSON line for each target and kind of layer")
    arguments = parser.parse_args()
    sessions.check_targets(arguments.target)
    if arguments.saved and (arguments.simulate is not None or arguments.law):
        raise UserError("saved: tunes for the GPU of the profile's rows: it does not go with --simulate and --law")
    if arguments.timer and arguments.sms:
        raise UserError("timer: measures whole tokens on the whole GPU: it does not go with --sms")
    if arguments.out is None and arguments.model is None:
        raise UserError("out: random weights have no folder; say where the plan goes")

    by_quality = arguments.objective == "quality" or arguments.each_block
    if arguments.each_block and arguments.objective == "paper":
        raise UserError("each-block: goes with --objective quality; the paper's phases know kinds of layers only")

    shapes, rows = sessions.model_shapes(arguments, arguments.each_block), read_profile(arguments.profile)
    gains = None
    if arguments.objective != "paper" and arguments.model is not None:
        gains = gains_of.read_gains(arguments.model, shapes.layers)
    elif by_quality:
        gains = gains_of.of_normal_inputs(shapes.layers), gains_of.NORMAL
    if gains is None and by_quality:
        raise UserError("objective: quality needs calibration data: a folder with gains.safetensors "
                        "(measure_gains.py), or with a thresholds.pt that holds the energy of residuals")
    with ExitStack() as stack:
        if arguments.saved:
            session = sessions.saved_session(arguments, arguments.sms)
        else:
            session = stack.enter_context(sessions.open_session(arguments, arguments.sms))
        token_timer = stack.enter_context(TokenTimer(arguments.timer)) if arguments.timer else None
        token_ms = token_timer.base_ms() if token_timer else arguments.token_ms
        base_us = decide.total_us(Timings(shapes.layers, session.conditions, rows))
        rest = rest_us(arguments, token_ms, shapes, session, base_us)
        targets = [Target(percent, arguments.scope, rest) for percent in arguments.target]
        made = tune(shapes, session, rows, targets, gains, arguments.profile, token_timer)
    out = Path(arguments.out or Path(arguments.model) / plan.PLAN)
    plan.save_plan(out, made)
    for row in plan_report.rows(made) if arguments.rows else ():
        append_row(arguments.rows, row)
    print(plan_report.text(made))
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
