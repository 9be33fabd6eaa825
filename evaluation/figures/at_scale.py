"""What the study's residual forms would mean for Llama-3-8B and 70B on the paper's GPUs: predicted, not measured.

From rows of selection_study.py (how much loss each form recovers at each k_chunk) and of autotuner/at_scale.py (predicted time a
token). Perplexity of Llama-3-8B-Instruct at 3 bits is the paper's without compensation, less what the measured curve says, scaled
once so that the paper's own residuals meet the paper's two compensated values (its sections 5.2 and 5.3). One picture and two
tables.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from series import METHODS, bench_rows, markdown, written

from decdec import figure_style as style
from decdec.errors import UserError, run
from decdec.files import atomic

# Llama-3-8B-Instruct on WikiText, as the paper prints it: perplexity at k_chunk 0, at 8, and at a tuned k_chunk (the mean over layers).
PAPER = {"awq": (10.15, {8: 9.63, 56: 9.12}), "squeezellm": (10.49, {8: 9.93, 46: 9.41})}
FORMAT = {"awq": "uniform", "squeezellm": "codebook"}
OURS = {"awq": "nested 2", "squeezellm": "row scales 2"}
REFERENCE = ("paper 4", 16)  # the recovered loss that every other one is measured by
Curve = Callable[[float], float]


def interpolated(xs: Sequence[float], ys: Sequence[float]) -> Curve:
    """Piecewise linear; beyond the last point it goes on with the last slope."""
    def at(x: float) -> float:
        for (x_0, y_0), (x_1, y_1) in zip(zip(xs, ys), zip(xs[1:], ys[1:])):
            if x <= x_1:
                break
        return y_0 + (y_1 - y_0) * (x - x_0) / (x_1 - x_0)
    return at


def recovered(rows: list[dict], method: str, variant: str) -> Curve:
    """Loss recovered by ``variant`` at a ``k_chunk``, over that of the reference, mean of the models measured."""
    shares: dict[int, list[float]] = {}
    for model in {row["model"] for row in rows if row["method"] == method}:
        loss = {(row["variant"], row["k_chunk"]): math.log(row["perplexity"]) for row in rows
                if (row["model"], row["method"]) == (model, method)}
        base = loss["paper 4", 0]
        for (name, k_chunk), value in loss.items():
            if name == variant and k_chunk:
                shares.setdefault(k_chunk, []).append((base - value) / (base - loss[REFERENCE]))
    if not shares:
        raise UserError(f"rows: no {variant} of {method}")
    complete = {k: sum(values) / len(values) for k, values in sorted(shares.items()) if len(values) == max(map(len, shares.values()))}
    # Even in the logarithm, which stretches the first channels, each worth the most.
    curve = interpolated([0.0, *(math.log2(1 + k) for k in complete)], [0.0, *complete.values()])
    return lambda k: curve(math.log2(1 + k))


def predicted(rows: list[dict], method: str) -> dict[str, Curve]:
    """Predicted perplexity of Llama-3-8B-Instruct against k_chunk for the paper's residuals and for ours."""
    base, known = PAPER[method]
    curves = {variant: recovered(rows, method, variant) for variant in ("paper 4", OURS[method])}
    theirs = {k: curves["paper 4"](k) for k in known}
    scale = sum(theirs[k] * math.log(base / value) for k, value in known.items()) / sum(value**2 for value in theirs.values())
    return {variant: lambda k, curve=curve: base * math.exp(-scale * curve(k)) for variant, curve in curves.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="JSON-lines files of selection_study.py and of autotuner/at_scale.py")
    parser.add_argument("--method", default="awq", choices=list(PAPER), help="base quantizer (default awq)")
    parser.add_argument("--gpu", nargs="+", default=["4090", "4070S", "4050M"], help="GPUs drawn (default 4090 4070S 4050M)")
    parser.add_argument("--target", type=float, nargs="+", default=[2.5, 5, 20],
                        help="slow-downs of the table, percent (default 2.5 5 20)")
    parser.add_argument("--out", required=True, help="picture and table to write (.pdf, .png, .md)")
    arguments = parser.parse_args()
    perplexity = predicted(bench_rows(arguments.rows, "selection_study"), arguments.method)
    scaled = [row for row in bench_rows(arguments.rows, "at scale") if row["format"] == FORMAT[arguments.method]]
    times = {(row["gpu"], f"{'nested' if row['nested'] else 'paper'} {row['residual_bits']}"): row for row in scaled
             if row["model"] == "llama-3-8b"}
    forms = {"paper 4": perplexity["paper 4"], "nested 2": perplexity[OURS[arguments.method]]}
    gpus = list(dict.fromkeys(gpu for gpu, _ in times))
    if missing := set(arguments.gpu) - set(gpus):
        raise UserError(f"--gpu: expected one of {', '.join(gpus)}, got {min(missing)}")

    with style.figure(arguments.out, height=1.9, ncols=len(arguments.gpu), sharey=True) as (_, axes):
        for axis, gpu in zip(axes if len(arguments.gpu) > 1 else [axes], arguments.gpu):
            for look, (form, curve) in zip(style.LINES, forms.items()):
                row = times[gpu, form]
                axis.plot(row["ms_per_token"], [curve(k) for k in row["k_chunk"]], label=f"{form} bits", **look)
            alone = times[gpu, "paper 4"]["ms_per_token"][0]
            axis.set_xlim(0.97 * alone, 1.3 * alone)
            axis.set_title(gpu)
            axis.set_xlabel("ms a token")
        (axes if len(arguments.gpu) == 1 else axes[0]).set_ylabel("Predicted perplexity")
        (axes if len(arguments.gpu) == 1 else axes[-1]).legend(fontsize=6, loc="upper right")

    base = PAPER[arguments.method][0]
    fits = []
    for gpu in gpus:
        alone = times[gpu, "paper 4"]["ms_per_token"][0]
        cells = []
        for target in arguments.target:
            for form, curve in forms.items():
                row = times[gpu, form]
                time = interpolated(row["k_chunk"], row["ms_per_token"])
                k_chunk = max(k for k in range(row["k_chunk"][-1] + 1) if time(k) <= alone * (1 + target / 100))
                cells.append(f"{curve(k_chunk):.2f} (k {k_chunk})")
        fits.append((gpu, f"{alone:.2f}", *cells))
    memory = {(row["model"], row["residual_bits"]): row["host_bytes"] / 1e9 for row in scaled}
    bits = sorted({of for _, of in memory}, reverse=True)
    held = [(model, *(f"{memory[model, of]:.2f}" for of in bits)) for model in dict.fromkeys(name for name, _ in memory)]
    choices = [f"{form} bits, +{target:g} %" for target in arguments.target for form in forms]
    lines = [f"Llama-3-8B-Instruct, {METHODS[arguments.method]}, 3 bits, **predicted**: k_chunk that fits and perplexity there (without "
             f"compensation {base:.2f}). Beyond the largest k_chunk of the study, curves go on with their last slope.", "",
             *markdown(("GPU", "ms a token", *choices), fits), "", "CPU memory of the residuals, GB:", "",
             *markdown(("model", *(f"{of} bits" for of in bits)), held)]
    with atomic(Path(arguments.out).with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    written(arguments.out)


if __name__ == "__main__":
    run(main)
