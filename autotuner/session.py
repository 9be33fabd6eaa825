"""What run_profile.py and tuner.py are asked about: a model, a GPU that is here, limited or simulated, and a
profile."""

import argparse
import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import analytic
import datasheet
import shapes
import simulated
from profiling import Timer
from shapes import Shapes
from timings import Conditions, read_profile

from decdec import plan
from decdec.artifacts import FORMATS
from decdec.errors import UserError
from decdec.files import config_hash
from decdec.sizes import NAMED

DTYPES = ("float16", "bfloat16")
SELECTIONS = ("exact", "bucket")
SIMULATED = "simulated"  # and a hash of the rates stands for the kernels' hash in a simulation
LAW = "law"  # added where the paper's law alone is simulated


@dataclass(frozen=True)
class Session:
    """A device to tune for, open. ``timer`` is None where only saved rows speak for it."""

    device: plan.Device
    conditions: Conditions
    rates: analytic.Rates
    timer: Timer | None
    facts: dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="FOLDER", help="a folder made by decdec_setup")
    parser.add_argument("--random-weights", metavar="NAME",
                        help=f"shapes of a known model instead: {', '.join(NAMED)}")
    parser.add_argument("--bits", type=float, default=3,
                        help="of random weights: 2, 3, 4, or 3.5 for half 3 and half 4 (default 3)")
    parser.add_argument("--format", choices=FORMATS, default="codebook", help="of random weights (default codebook)")
    parser.add_argument("--simulate", metavar="GPU", help=f"a GPU that is not here: {', '.join(datasheet.GPUS)}")
    parser.add_argument("--law", action="store_true",
                        help="simulate by the paper's law (section 5.1), without fixed costs")
    parser.add_argument("--selection", choices=SELECTIONS, default="exact",
                        help="channel selection: exact (the default, as the runtime's) or bucket (the paper's)")
    parser.add_argument("--repair", action="store_true",
                        help="with the folder's static repair in every layer that is compensated, which takes its time too")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of activations (default float16)")
    parser.add_argument("--profile", required=True, metavar="FILE", help="JSON-lines file of measured times")


def check_targets(percents: Sequence[float]) -> None:
    if wrong := [percent for percent in percents if not 0 < percent < math.inf]:
        raise UserError(f"target: expected finite percentages above 0, got {wrong[0]:g}")


def model_shapes(arguments: argparse.Namespace, each_block: bool = False) -> Shapes:
    if (arguments.model is None) == (arguments.random_weights is None):
        raise UserError("model: expected either a model folder or --random-weights NAME")
    if arguments.model is not None:
        return shapes.from_folder(arguments.model, each_block, arguments.repair)
    if arguments.repair:
        raise UserError("repair: expected a model folder that has one, got --random-weights")
    return shapes.random_weights(arguments.random_weights, arguments.bits, arguments.format, each_block)


@contextmanager
def open_session(arguments: argparse.Namespace, sms: int | None):
    """The session for the GPU here, limited to ``sms`` SMs if given, or for the one simulated."""
    if arguments.simulate is not None:
        if sms is not None:
            raise UserError("sms: a simulated GPU has the SMs of its data sheet")
        sheet = datasheet.sheet_of(arguments.simulate)
        rates = simulated.simulated_rates(sheet)
        if arguments.law:
            rates = rates.without_fixed_costs()
        device = plan.Device(sheet.name, sheet.sms, simulated=True)
        library = f"{SIMULATED}{f'-{LAW}' * arguments.law}-{config_hash(asdict(rates))}"
        conditions = _conditions(arguments, device, library)
        yield Session(device, conditions, rates, simulated.SimulatedTimer(rates), {})
        return
    if arguments.law:
        raise UserError("law: only a simulation (--simulate GPU) can follow the law")
    here = plan.this_device()
    if here is None:
        raise UserError("no GPU here (torch finds none): use --simulate GPU to tune for one from its data sheet")
    import gpu

    if sms is not None and sms > here.sms:
        raise UserError(f"sms: {here.name} has {here.sms} SMs, {sms} were asked for")
    with gpu.limited_to(sms) as granted:
        device = plan.Device(here.name, granted or here.sms)
        timer = gpu.GpuTimer(arguments.dtype, arguments.selection)
        conditions = _conditions(arguments, device, gpu.library_hash())
        yield Session(device, conditions, gpu.measure_rates(device.sms), timer, gpu.facts())


def _conditions(arguments: argparse.Namespace, device: plan.Device, library: str) -> Conditions:
    return Conditions(device.name, device.sms, library, arguments.dtype, arguments.selection)


def saved_session(arguments: argparse.Namespace, sms: int | None) -> Session:
    """The session that a profile's own rows describe, for tuning on a machine without that GPU."""
    found = {}
    for row in read_profile(arguments.profile):
        if row["what"] == "rates" and sms in (None, row["sms"]):
            device = plan.Device(row["device"], row["sms"], row["library"].startswith(SIMULATED))
            found[device] = row
    if len(found) != 1:
        known = ", ".join(f"{device.name} with {device.sms} SMs" for device in found) or "none that fits"
        raise UserError(f"profile: {arguments.profile}: expected rows of one device, got {known}; choose by --sms, "
                        "or profile into a file of its own")
    (device, row), = found.items()
    rates = analytic.Rates(row["dram_gb_s"], row["link_gb_s"], device.sms)
    return Session(device, _conditions(arguments, device, row["library"]), rates, None, {})


def rates_row(session: Session) -> dict:
    """The rates that a profile's times stand beside, with facts about the machine."""
    return {"what": "rates", "device": session.device.name, "sms": session.device.sms,
            "library": session.conditions.library, "dram_gb_s": session.rates.dram_gb_s,
            "link_gb_s": session.rates.link_gb_s, **session.facts}
