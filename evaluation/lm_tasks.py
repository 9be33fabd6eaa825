"""Tasks of lm-eval (BBH, LAMBADA, PIQA, word perplexity, any other) for an original model or a DecDEC folder.

One JSON line a task, metric and setting is appended to --out, with the task's version and what was compensated: "generated
tokens" (the prompt is not, as in the paper), or "every position" (--compensate-prompt, and tasks that score given tokens). A task
whose lines are there already is not run again. Data-parallel: accelerate launch evaluation/lm_tasks.py ...
"""

import argparse
import logging
import tempfile
import time

import lm_eval
from decdec_lm import DecDECLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from local_tasks import write_tasks
from subject import SUBJECT_KEY, Rows, Setting, add_arguments, add_settings, before, from_arguments

from decdec.errors import UserError, run

KEY = (*SUBJECT_KEY, "task", "task_version", "metric", "filter", "limit", "max_gen_toks", "compensated")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    add_settings(parser)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names or patterns, such as 'bbh_cot_fewshot_*'")
    parser.add_argument("--data", help="folder of local data (bbh/, lambada/, piqa/, wikitext2/); only its tasks are then known")
    parser.add_argument("--include-path", help="folder with further task files in lm-eval's format")
    parser.add_argument("--limit", type=int, help="first examples of each task (default all)")
    parser.add_argument("--max-gen-toks", type=int, help="cut generations at so many tokens (default: the task's own limit)")
    parser.add_argument("--compensate-prompt", action="store_true", help="compensate prompts of generating tasks as well")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences at once (default 1)")
    parser.add_argument("--out", default="evaluation/results/lm_tasks.jsonl", help="JSON-lines file the rows go to")
    arguments = parser.parse_args()
    for name in ("limit", "batch_size", "max_gen_toks"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected a positive number, got {value}")
    return arguments


def find_tasks(arguments: argparse.Namespace, folder: str) -> tuple[TaskManager, dict]:
    """The tasks asked for by name, from ``--data`` (written to ``folder``), ``--include-path`` and lm-eval's own."""
    paths = [path for path in (arguments.include_path,) if path]
    if arguments.data:
        write_tasks(arguments.data, folder)
        paths.append(folder)
    manager = TaskManager(include_path=paths, include_defaults=not arguments.data)
    names = []
    for pattern in arguments.tasks:
        matched = manager.match_tasks([pattern])
        if not matched:
            raise UserError(f"--tasks: no task is called {pattern!r}" + (f" in {arguments.data}" if arguments.data else ""))
        names += [name for name in matched if name not in names]
    try:
        return manager, manager.load(names)["tasks"]
    except Exception as error:  # the hub client raises many kinds
        raise UserError(f"--tasks: data of {', '.join(names)} could not be loaded ({type(error).__name__}: "
                        f"{str(error).splitlines()[0]}); --data takes local files") from error


def compensated(task, setting: Setting, compensate_prompt: bool) -> str:
    if not setting.k_chunk:
        return "none"
    return "generated tokens" if task.OUTPUT_TYPE == "generate_until" and not compensate_prompt else "every position"


def values(results: dict, name: str) -> list[dict]:
    """One entry a metric from lm-eval's flat ``metric,filter`` keys."""
    flat, entries = results["results"][name], []
    for key, value in flat.items():
        metric, _, chosen = key.partition(",")
        if isinstance(value, int | float) and chosen and not metric.endswith("_stderr"):
            error = flat.get(f"{metric}_stderr,{chosen}")
            entries.append({"metric": metric, "filter": chosen, "value": round(value, 5),
                            "stderr": round(error, 5) if isinstance(error, int | float) else None,
                            "n": results["n-samples"][name]["effective"], "num_fewshot": results["n-shot"].get(name)})
    return entries


def main() -> None:
    arguments = parse_arguments()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    subject = from_arguments(arguments)
    settings = subject.settings(arguments.selection, arguments.k_chunk)
    rows = Rows(arguments.out, KEY)
    model = None
    with tempfile.TemporaryDirectory() as folder:
        manager, tasks = find_tasks(arguments, folder)
        for setting, shared in zip(settings, subject.compensated_rows("lm_eval", settings), strict=True):
            for name, task in tasks.items():
                row = shared | {"task": name, "task_version": task.VERSION, "limit": arguments.limit,
                                "max_gen_toks": arguments.max_gen_toks, "lm_eval": lm_eval.__version__,
                                "compensated": compensated(task, setting, arguments.compensate_prompt)}
                known = find_all(rows, row)
                if not known:
                    start = time.monotonic()
                    model = model or DecDECLM(arguments.model, device=arguments.device, dtype=subject.dtype,
                                              cheatsheet=arguments.cheatsheet, batch_size=arguments.batch_size)
                    model.compensate(setting.compensation(subject.seed, prefill=False), arguments.compensate_prompt)
                    shorter = {"max_gen_toks": arguments.max_gen_toks} if arguments.max_gen_toks else None
                    results = simple_evaluate(model, tasks=[task], limit=arguments.limit, gen_kwargs=shorter, bootstrap_iters=1000,
                                              task_manager=manager, log_samples=False)
                    if results is None:  # a process other than the first of a data-parallel run
                        continue
                    seconds = round(time.monotonic() - start, 1)
                    known = [row | entry | {"seconds": seconds} for entry in values(results, name)]
                    rows.append(*known)
                for measured in known:
                    print(f"{name}, {row['method']} {row['bits']} bits, {setting.selection}, k_chunk {setting.k_chunk}: "
                          f"{measured['metric']} {measured['value']:.4f} +- {measured['stderr'] or 0:.4f} ({measured['n']} examples)")
    print(f"rows are in {arguments.out}")


def find_all(rows: Rows, row: dict) -> list[dict]:
    """The rows of this task and setting, whatever their metrics."""
    names = [name for name in KEY if name not in ("metric", "filter")]
    for wanted in (row, before(row)):
        if found := [known for known in rows.known.values() if all(str(known.get(name)) == str(wanted.get(name)) for name in names)]:
            return found
    return []


if __name__ == "__main__":
    run(main)
