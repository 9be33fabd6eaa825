"""Plans as people and tables read them, in the notation of the paper's Table 3: n_tb/(k_qkv,k_o,k_gu,k_d)."""

from collections.abc import Iterator

from decdec.plan import Plan, Tuned


def settings(tuned: Tuned, bits: int) -> str:
    """``n_tb^max/(k_qkv,k_o,k_gu,k_d)`` for the layers of one bit width; ``8-90`` where blocks differ."""
    n_max = max((choice.n_tb for choice in tuned.choices if choice.bits == bits and choice.k_chunk), default=0)
    return f"{n_max}/({','.join(by_kind(tuned, bits, 'k_chunk'))})"


def by_kind(tuned: Tuned, bits: int, what: str) -> list[str]:
    """Field ``what`` of the choices of one bit width, one entry a kind."""
    values = {}
    for choice in tuned.choices:
        if choice.bits == bits:
            values.setdefault(choice.kind, []).append(getattr(choice, what))
    return [f"{min(many)}-{max(many)}" if min(many) < max(many) else str(many[0]) for many in values.values()]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}%"


def text(plan: Plan) -> str:
    """A few lines for the terminal."""
    device = plan.device
    lines = [f"{plan.model} ({plan.method}) on {device.name}, {device.sms} SMs{', SIMULATED' * device.simulated}; "
             f"memory {plan.dram_gb_s:.0f} GB/s, link {plan.link_gb_s:.1f} GB/s"]
    for tuned in plan.tuned:
        gain = "" if tuned.gain is None else f", removes {tuned.gain:.3g} {plan.gain_source}"
        token = "" if tuned.token_percent is None else f", a token {percent(tuned.token_percent)}"
        lines.append(f"target {tuned.target_percent:g}% {tuned.scope}, {tuned.objective}: predicted "
                     f"{percent(tuned.predicted_percent)}, measured {percent(tuned.measured_percent)}{token}{gain}")
        for bits in sorted({choice.bits for choice in tuned.choices}):
            n_tb = ",".join(by_kind(tuned, bits, "n_tb"))
            lines.append(f"  {bits}-bit  n_tb/(k_chunk of qkv,o,gu,d)  {settings(tuned, bits)}   n_tb ({n_tb})")
    return "\n".join(lines)


def rows(plan: Plan) -> Iterator[dict]:
    """One row for each target, kind of layer and setting; ``count`` layers share it.

    Times are over that kind's own base time.
    """
    for tuned in plan.tuned:
        same = {}
        for choice in tuned.choices:
            same.setdefault((choice.kind, choice.bits, choice.n_tb, choice.k_chunk), []).append(choice)
        for choice, *others in same.values():
            count = sum(one.count for one in (choice, *others))
            yield {"shapes": plan.model, "method": plan.method, "bits": choice.bits,
                   "target": tuned.target_percent, "scope": tuned.scope, "objective": tuned.objective,
                   "kind": choice.kind, "count": count, "n_tb": choice.n_tb, "k_chunk": choice.k_chunk,
                   "base_us": choice.base_us, "predicted": choice.predicted_us / choice.base_us,
                   "measured": choice.measured_us and choice.measured_us / choice.base_us,
                   "predicted_percent": tuned.predicted_percent, "measured_percent": tuned.measured_percent,
                   "token_percent": tuned.token_percent, "device": plan.device.name, "sms": plan.device.sms,
                   "simulated": plan.device.simulated, "selection": plan.selection} | plan.versions
