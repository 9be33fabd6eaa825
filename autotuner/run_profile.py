"""Measure how long each kind of layer takes with and without compensation: rows that tuner.py chooses from.

Times are CUDA-graph replays with a cold L2; the link's and the memory's rates are measured in the same run. Points are
first coarse (every n_tb candidate of the paper, k_chunk up to twice the knee), then fine around what the paper's tuner
chooses for the targets. Rows already in the profile are not measured again.
"""

import argparse
import functools

import decide
import profiling
import session as sessions
from profiling import Profiler
from timings import Timings, read_profile
from tqdm import tqdm

from decdec.errors import UserError, run
from decdec.files import append_row


def sm_counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected SM counts such as 20,36,56, got {text!r}") from None
    if min(counts) < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2 SMs, got {min(counts)}")
    return counts


def profile(arguments: argparse.Namespace, layers, sms: int | None, rows: list[dict]) -> None:
    with sessions.open_session(arguments, sms) as session:
        append_row(arguments.profile, sessions.rates_row(session))
        timings = Timings(layers, session.conditions, rows)
        n_limit = max(1, session.device.sms // 2)
        with tqdm(desc=f"{session.device.name}, {session.device.sms} SMs", unit="point", mininterval=0.5) as bar:
            profiler = Profiler(timings, session.timer, arguments.profile, bar)
            for layer in layers:
                profiler.measure(layer, 0, 0)
            points = {layer: profiling.coarse_points(layer, timings.base(layer), session.rates.dram_gb_s,
                                                     session.rates.link_gb_s, n_limit) for layer in layers}
            bar.total = len(layers) + sum(map(len, points.values()))  # what refining adds is not known yet, and small
            for layer in layers:
                profiling.measure_coarsely(profiler, layer, points[layer])
            targets = [decide.Target(percent) for percent in arguments.target]
            profiling.refine(profiler, [functools.partial(decide.decide, target=target, gains=None, n_limit=n_limit)
                                        for target in targets])
        profiler.warn_if_noisy()
        print(f"{session.device.name}, {session.device.sms} SMs{' (simulated)' * session.device.simulated}: "
              f"memory {session.rates.dram_gb_s:.0f} GB/s, link {session.rates.link_gb_s:.1f} GB/s")
        for layer in layers:
            measured = sum(len(points) for points in timings.points[layer].values())
            print(f"  {layer.label:10} {layer.d_in:6}x{layer.d_out:<6} base {timings.base(layer):8.2f} us, "
                  f"{measured} points")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sessions.add_arguments(parser)
    parser.add_argument("--sms", type=sm_counts,
                        help="profile on so many SMs of the GPU, one after another: 20,36,56,80")
    parser.add_argument("--target", type=float, nargs="+", default=[2.5, 5, 10, 20], metavar="PERCENT",
                        help="slow-downs around whose answers points are dense (default 2.5 5 10 20)")
    arguments = parser.parse_args()
    sessions.check_targets(arguments.target)
    shapes = sessions.model_shapes(arguments)
    for sms in arguments.sms or [None]:
        profile(arguments, shapes.layers, sms, read_profile(arguments.profile, missing_ok=True))
    print(f"wrote {arguments.profile}")


if __name__ == "__main__":
    run(main)
