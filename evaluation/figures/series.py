"""What figures and tables share: rows of one measurement under the same conditions, names, lines over k_chunk, Markdown."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from decdec import figure_style as style
from decdec.errors import UserError
from decdec.files import read_rows

METHODS = {"awq": "AWQ", "squeezellm": "SqueezeLLM", "rtn": "round to nearest", "gptq": "GPTQ"}
SELECTIONS = {"bucket": "DecDEC", "exact": "Exact", "static": "Static", "random": "Random"}
KINDS = {"qkv": "q, k, v", "o": "output", "gu": "gate, up", "d": "down"}
TEXT = ("model", "text_hash", "windows", "window_length", "dtype")


def bench_rows(paths: Iterable[str], bench: str, conditions: Sequence[str] = (),
               wanted: Callable[[dict], bool] = lambda row: True) -> list[dict]:
    """Rows of ``bench`` in the files ``paths`` that are ``wanted``; only those that agree with the last one in ``conditions``
    can be compared."""
    paths = list(paths)
    rows = [row for path in paths for row in read_rows(path) if row.get("bench") == bench and wanted(row)]
    if not rows:
        raise UserError(f"{', '.join(paths)}: no {bench} rows of what is to be drawn")
    kept = [row for row in rows if all(row.get(name) == rows[-1].get(name) for name in conditions)]
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} rows of other {', '.join(conditions)} are left out", file=sys.stderr)
    return kept


def bits_name(bits: int | list[int]) -> str:
    """``3``, or ``3.5`` for a model whose layers have 3 and 4 bits."""
    return f"{sum(bits) / len(bits):g}" if isinstance(bits, list) else str(bits)


def model_label(row: dict, groups: bool = False) -> str:
    """What is compensated: the model, its groups' size if asked for, and its static repair where it has one."""
    name = f"{METHODS.get(row['method'], row['method'])}, {bits_name(row['bits'])} bits"
    name += f", groups of {row['group_size']}" if groups and row.get("group_size") else ""
    return f"{name}, repaired" if row.get("repair") else name


def label(row: dict, model: str | None = None) -> str:
    model = model or model_label(row)
    return f"{model}, nested {row['residual_bits']}" if row.get("nested") else model


def of_last_models(rows: Sequence[dict]) -> list[tuple[str, dict]]:
    """Rows with their models' labels, which tell the size of groups where it is not the same for all of a method and its bits.

    Of models with the same label only the last one's weights and repair: others were made otherwise. Rows of originals that
    earlier versions wrote have no hash and stay.
    """
    sizes = defaultdict(set)
    for row in rows:
        sizes[model_label(row)].add(row.get("group_size"))
    named = [(model_label(row, groups=len(sizes[model_label(row)]) > 1), row) for row in rows]
    weights = {name: row["weights_hash"] for name, row in named if row.get("weights_hash")}
    repairs = {name: row.get("repair") for name, row in named}
    kept = [(name, row) for name, row in named
            if row.get("weights_hash") in (None, weights.get(name)) and row.get("repair") == repairs[name]]
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} rows of older weights or repairs are left out", file=sys.stderr)
    return kept


def by_k_chunk(rows: Iterable[dict], value: str, selection: str) -> tuple[dict[str, dict[int, float]], float | None]:
    """Lines ``{label: {k_chunk: value}}`` of the quantized models under ``selection``, and the original model's value.

    Runs with several seeds are averaged. Residuals of the paper's 4 bits, or nested ones.
    """
    lines, base = defaultdict(lambda: defaultdict(dict)), defaultdict(dict)  # by label, k_chunk and seed; by model and seed
    of = {}
    for model, row in of_last_models([row for row in rows if row[value] is not None]):
        seed = row.get("seed")
        if row["k_chunk"] == 0:
            base[model][seed] = row[value]
        elif row["selection"] == selection and (row.get("nested") or row["residual_bits"] in (None, 4)):
            lines[label(row, model)][row["k_chunk"]][seed] = row[value]
            of[label(row, model)] = model
    for name, points in lines.items():  # a model that was never compensated has no line
        if of[name] in base:
            points[0] = base[of[name]]
    means = {name: {k: _mean(points[k]) for k in sorted(points)} for name, points in sorted(lines.items())}
    return means, next((_mean(values) for name, values in base.items() if name.startswith("original,")), None)


def _mean(by_seed: dict[int, float]) -> float:
    return sum(by_seed.values()) / len(by_seed)


@contextmanager
def k_chunk_figure(path: str, lines: dict[str, dict[int, float]], original: float | None, unit: str) -> Iterator:
    """Lines over even steps of k_chunk, as the paper draws them: a logarithmic axis would lose k_chunk = 0. Yields the axes."""
    ticks = sorted({k_chunk for points in lines.values() for k_chunk in points})
    with style.figure(path, height=2.2 + 0.12 * len(lines)) as (figure, axes):
        for look, (name, points) in zip(style.LINES, lines.items(), strict=False):
            axes.plot([ticks.index(k) for k in points], list(points.values()), label=name, **look)
        if original is not None:
            # A drawn line, for one by axhline would not widen the range of y.
            axes.plot([0, len(ticks) - 1], [original] * 2, color="black", linewidth=0.8, linestyle=(0, (1, 1)), label="full precision")
        axes.set_xticks(range(len(ticks)), [str(k) for k in ticks])
        axes.set_xlabel("$k_{chunk}$ (channels per 1024)")
        axes.set_ylabel(unit)
        yield axes
        figure.legend(loc="outside lower center", ncols=2)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    first, *others = (f"| {' | '.join(row)} |" for row in (head, *rows))
    return [first, "|---" * len(head) + "|", *others]


def written(out: str) -> None:
    print(f"wrote {out} as PDF and PNG")
