"""``plan.json``: what the autotuner chose for one model on one GPU. Schema, write, read, refuse, apply."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from decdec.artifacts import QuantConfig
from decdec.errors import UserError
from decdec.files import read_json, write_json
from decdec.models import block_of

PLAN = "plan.json"
FORMAT, VERSION = "decdec.plan", 1


@dataclass(frozen=True)
class Device:
    """A GPU, whole or limited to ``sms`` SMs. ``simulated``: times are from data-sheet figures, not measured."""

    name: str
    sms: int
    simulated: bool = False


@dataclass(frozen=True)
class Choice:
    """The settings of one kind of layer (``qkv``, ``o``, ``gu``, ``d``) at one bit width, in all blocks or in one;
    times are of one layer, in microseconds."""

    kind: str
    bits: int
    d_in: int
    d_out: int
    count: int  # such layers in the model
    n_tb: int
    k_chunk: int
    base_us: float
    predicted_us: float
    measured_us: float | None = None  # timed afresh after the choice
    block: int | None = None  # None for all blocks


@dataclass(frozen=True)
class Tuned:
    """The choices for one target. ``scope``: the slow-down of the linear layers' ``kernel`` times, or ``end-to-end`` of
    a token."""

    target_percent: float
    scope: str
    objective: str  # "quality": most predicted loss removed; "paper": the paper's two phases; "quality by block"
    predicted_percent: float
    measured_percent: float | None
    rest_us: float  # of a token outside the linear layers; 0 if not known, which only the kernel scope allows
    gain: float | None  # predicted loss removed, in the unit of the plan's ``gain_source``
    choices: tuple[Choice, ...]
    token_percent: float | None = None  # for the kernel scope: how much longer a token took in the runtime, if it was asked

    def choice(self, kind: str, bits: int, block: int | None = None) -> Choice:
        for choice in self.choices:
            if (choice.kind, choice.bits) == (kind, bits) and choice.block in (None, block):
                return choice
        raise UserError(f"{PLAN}: has no choice for {kind} layers of {bits} bits: a plan of another model")


@dataclass(frozen=True)
class Plan:
    """All targets tuned in one call; the first is the default. ``weights_hash`` is None for random weights. ``repair``: layers
    that are compensated take the folder's static repair along."""

    model: str
    method: str
    weights_hash: str | None
    device: Device
    selection: str  # "bucket" or "exact": the selection that was timed
    dram_gb_s: float
    link_gb_s: float
    gain_source: str | None
    versions: dict[str, str]
    tuned: tuple[Tuned, ...]
    repair: bool = False

    def at(self, target_percent: float | None = None) -> Tuned:
        """The choices for ``target_percent``, by default the first target."""
        if target_percent is None:
            return self.tuned[0]
        for tuned in self.tuned:
            if tuned.target_percent == target_percent:
                return tuned
        raise UserError(f"target: the plan was tuned for {', '.join(f'{t.target_percent:g}' for t in self.tuned)} %, "
                        f"not for {target_percent:g} %")


def this_device() -> Device | None:
    """The current GPU; None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(properties.name, properties.multi_processor_count)


def save_plan(path: str | Path, plan: Plan) -> None:
    write_json(path, {"format": FORMAT, "version": VERSION} | asdict(plan))


def load_plan(path: str | Path, quant: QuantConfig | None = None, device: Device | None = None) -> Plan:
    """Read ``plan.json``, and refuse one made for other weights than ``quant`` or another GPU than ``device``, where
    given.

    Without a GPU ``device`` is None and any plan serves: a CPU ignores n_tb, and quality depends on k_chunk alone.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        raise UserError(f"{path}: expected format '{FORMAT}' version {VERSION}, got another file")
    try:
        plan = _plan(content)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: expected a complete plan, got one that cannot be read ({error}); "
                        "tune again") from None
    if not plan.tuned:
        raise UserError(f"{path}: holds no tuned target; tune again")
    if quant is not None and plan.weights_hash != quant.weights_hash:
        raise UserError(f"{path}: tuned for weights {plan.weights_hash} of {plan.model}, "
                        f"but the folder's are {quant.weights_hash} of {quant.base_model}; "
                        "run the autotuner on this folder")
    if device is not None and plan.device != device:
        raise UserError(f"{path}: tuned for {_words(plan.device)}, but this is {_words(device)}; "
                        "run the autotuner here")
    return plan


def apply(plan: Plan, model: nn.Module, target_percent: float | None = None, prefill: bool = False,
          residuals: str = "host") -> None:
    """Compensate every layer of ``model`` (anything :mod:`decdec.hub` serves) as chosen for its kind and bit width.

    ``residuals``: where those of layers on a GPU lie (:mod:`decdec.placement`).
    """
    from decdec import hub  # here, so that hub may use plans
    from decdec.linear import Compensation

    tuned = plan.at(target_percent)
    highest = max(choice.k_chunk for choice in tuned.choices)
    choices = {layer: tuned.choice(layer.kind, layer.bits, block_of(layer.name))
               for layer in hub.compensated_layers(model).values()}
    # Loads what every layer needs.
    hub.set_compensation(model, Compensation(highest, plan.selection, prefill, repair=plan.repair), residuals)
    for layer, choice in choices.items():
        layer.compensate(Compensation(choice.k_chunk, plan.selection, prefill, choice.n_tb,
                                      repair=plan.repair and choice.k_chunk > 0))


def _plan(content: Mapping) -> Plan:
    tuned = tuple(Tuned(**{key: tuple(Choice(**choice) for choice in value) if key == "choices" else value
                           for key, value in entry.items()}) for entry in content["tuned"])
    own = {field.name: content[field.name] for field in fields(Plan) if field.name in content}  # older plans know no repair
    return Plan(**own | {"device": Device(**content["device"]), "tuned": tuned})


def _words(device: Device) -> str:
    return f"{'a simulated ' if device.simulated else ''}{device.name} with {device.sms} SMs"
