"""Figure 14 of the paper: BBH accuracy against k_chunk, one line a method and bit width, from rows of lm_tasks.py.

The mean over the subtasks that every setting has been measured on, each subtask weighing the same.
"""

import argparse
from collections import defaultdict

from series import bench_rows, by_k_chunk, k_chunk_figure, of_last_models, written

from decdec.errors import UserError, run

SETTING = ("selection", "k_chunk", "residual_bits", "nested", "seed")


def accuracies(rows: list[dict]) -> tuple[list[dict], int]:
    """One row a setting with its mean accuracy in percent, and the number of subtasks that the mean is over."""
    settings = defaultdict(dict)
    for model, row in of_last_models(rows):
        settings[model, *(str(row.get(name)) for name in SETTING)][row["task"]] = row
    common = set.intersection(*(set(tasks) for tasks in settings.values()))
    if not common:
        raise UserError("no BBH subtask has been measured for every setting")
    return [next(iter(tasks.values())) | {"accuracy": 100 * sum(tasks[name]["value"] for name in common) / len(common)}
            for tasks in settings.values()], len(common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="JSON-lines files written by lm_tasks.py")
    parser.add_argument("--out", required=True, help="figure to write (.pdf and .png)")
    parser.add_argument("--selection", default="bucket", help="the selection whose rows are drawn (default bucket)")
    parser.add_argument("--compensate-prompt", action="store_true", help="draw the rows whose prompts were compensated too")
    arguments = parser.parse_args()
    compensated = ("none", "every position" if arguments.compensate_prompt else "generated tokens")
    rows = bench_rows(arguments.rows, "lm_eval", ("model", "limit", "max_gen_toks", "dtype"),
                      lambda row: (row["task"].startswith("bbh_") and row["metric"] == "exact_match"
                                   and row["compensated"] in compensated))
    means, subtasks = accuracies(rows)
    lines, original = by_k_chunk(means, "accuracy", arguments.selection)
    with k_chunk_figure(arguments.out, lines, original, "BBH exact match (%)") as axes:
        examples = f"{rows[-1]['limit']} examples each" if rows[-1]["limit"] else "all examples"
        axes.set_title(f"{subtasks} subtasks, {examples}")
    written(arguments.out)


if __name__ == "__main__":
    run(main)
