"""Perplexity and time a token at the autotuner's targets: the points of the paper's Figures 17 and 18 and of Table 3.

For every --plan (plan.json of autotuner/) and each of its targets: perplexity with the k_chunk chosen for each kind of layer, and
the plan's time a token on its GPU, marked as measured, predicted from measured kernel times, simulated from data sheets, or
simulated by the paper's law alone. The point without compensation comes first. One row a plan and target; a row that is there
already is not measured again.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

from perplexity import perplexity
from subject import SUBJECT_KEY, Rows, Setting, add_arguments, folder_from_arguments, sequence_length

from decdec import hub, models, text
from decdec.errors import run
from decdec.linear import Compensation
from decdec.plan import PLAN, Plan, Tuned, apply, load_plan

KEY = (*SUBJECT_KEY, "gpu", "sms", "target_percent", "scope", "objective", "timing", "text_hash", "windows", "window_length")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--plan", nargs="+", help="plan.json files of this folder's model, one a GPU (default: the folder's own)")
    parser.add_argument("--text", default="wikitext", help="wikitext, c4, pydoc or a file (default wikitext)")
    parser.add_argument("--windows", type=int, help="number of windows (default all)")
    parser.add_argument("--length", type=int, help="tokens a window (default 2048, or the model's context if shorter)")
    parser.add_argument("--out", default="evaluation/results/tuned.jsonl", help="JSON-lines file the rows go to")
    return parser.parse_args()


def token_ms(tuned: Tuned, compensated: bool) -> float:
    """Milliseconds a token: as a runtime measured it where one did, else the linear layers' times, measured where the plan
    has them, and the rest of the token."""
    if compensated and tuned.scope == "end-to-end" and tuned.measured_percent is not None:
        return token_ms(tuned, False) * (1 + tuned.measured_percent / 100)
    layers = sum(choice.count * ((choice.measured_us or choice.predicted_us) if compensated else choice.base_us)
                 for choice in tuned.choices)
    return (layers + tuned.rest_us) / 1000


def timing(plan: Plan, tuned: Tuned) -> str:
    if plan.device.simulated:
        return "by the law" if "-law-" in plan.versions["library"] else "simulated"
    return "predicted" if tuned.measured_percent is None else "measured"


def by_kind(tuned: Tuned, what: str) -> dict[str, int | list[int]]:
    """Field ``what`` of the choices by kind and bit width, such as ``{"qkv3": 55}``; a list where blocks differ."""
    values = {}
    for choice in tuned.choices:
        values.setdefault(f"{choice.kind}{choice.bits}", []).append(getattr(choice, what))
    return {name: many if len(set(many)) > 1 else many[0] for name, many in values.items()}


def any_channel(tuned: Tuned | None) -> bool:
    return tuned is not None and any(choice.k_chunk for choice in tuned.choices)


def points(plan: Plan) -> list[tuple[dict, Tuned | None]]:
    """The plan's part of each row, with the choices that it compensates by."""
    gpu = {"gpu": plan.device.name, "sms": plan.device.sms}
    first = plan.tuned[0]
    nothing = {"target_percent": 0, "scope": first.scope, "objective": "none", "k_chunk": 0, "n_tb": None, "predicted_percent": 0.0,
               "measured_percent": None, "ms_per_token": round(token_ms(first, False), 5), "timing": timing(plan, first)}
    found = [(gpu | nothing, None)]
    for tuned in plan.tuned:
        found.append((gpu | {"target_percent": tuned.target_percent, "scope": tuned.scope, "objective": tuned.objective,
                             "k_chunk": by_kind(tuned, "k_chunk"), "n_tb": by_kind(tuned, "n_tb"),
                             "predicted_percent": tuned.predicted_percent, "measured_percent": tuned.measured_percent,
                             "ms_per_token": round(token_ms(tuned, True), 5), "timing": timing(plan, tuned)}, tuned))
    return found


def main() -> None:
    arguments = parse_arguments()
    folder = folder_from_arguments(arguments)
    plans = [load_plan(path, folder.quant) for path in arguments.plan or [Path(arguments.model) / PLAN]]
    evaluation = text.load_text(arguments.text, "evaluation")
    length = sequence_length(arguments)
    ids = text.windows(evaluation, models.load_tokenizer(arguments.model), length, arguments.windows)
    rows = Rows(arguments.out, KEY)
    same = {}  # GPUs whose plans choose alike share a perplexity
    model = None
    for plan in plans:
        subject = replace(folder, repair=plan.repair)
        base, some = subject.compensated_rows("tuned", [Setting(), Setting(plan.selection, 1, plan.repair)])
        base |= {"repair": None, "repair_settings": None}  # a plan repairs no layer that it does not compensate
        for point, tuned in points(plan):
            row = (some if any_channel(tuned) else base) | point | {
                "text": evaluation.name, "text_hash": evaluation.hash, "windows": len(ids), "window_length": length,
                "compensated": "every position" if any_channel(tuned) else "none"}
            known = rows.find(row)
            if known is None:
                start = time.monotonic()
                choice = (row["selection"], row["repair"], str(point["k_chunk"]))
                if choice not in same:
                    model = model or subject.load()
                    if any_channel(tuned):
                        apply(plan, model, tuned.target_percent, prefill=True)
                    else:
                        hub.set_compensation(model, Compensation())
                    same[choice] = perplexity(model, ids, f"{point['gpu']}, target {point['target_percent']} %")
                value, error = same[choice]
                known = row | {"perplexity": round(value, 4), "loss_standard_error": round(error, 5),
                               "seconds": round(time.monotonic() - start, 1)}
                rows.append(known)
            print(f"{known['gpu']}, target {known['target_percent']} %: {known['ms_per_token']:.3f} ms a token "
                  f"({known['timing']}), perplexity {known['perplexity']:.3f}")
    print(f"rows are in {arguments.out}")


if __name__ == "__main__":
    run(main)
