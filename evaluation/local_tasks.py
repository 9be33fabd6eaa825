"""lm-eval's own task definitions over local data files, for machines that reach no hub.

Each task keeps its name, prompt, metric and version: the files written here include lm-eval's and replace only the data source
(and, where the local file names its columns otherwise, the expressions that read them).
"""

import json
import re
from pathlib import Path

import lm_eval.tasks
import yaml

from decdec.errors import UserError

BUILT_IN = Path(lm_eval.tasks.__file__).parent
# A page of WikiText starts at a heading of the first level: " = Title = ".
PAGE = re.compile(r"^ = [^=].*[^=] = \n", re.MULTILINE)


def write_tasks(data: str | Path, out: str | Path) -> list[str]:
    """Write task files to folder ``out`` for all that folder ``data`` holds; return the tasks' names.

    Known: ``bbh/bbh/TASK.json`` or ``bbh/TASK.json`` (BIG-Bench-Hard's own files), ``lambada/*.jsonl`` (``context``,
    ``continuation``), ``piqa/*.jsonl`` (``query``, ``choices``, ``gold``), ``wikitext2/wiki.test.raw``.
    """
    data, out = Path(data).resolve(), Path(out)
    tasks = {}
    for file in sorted([*data.glob("bbh/bbh/*.json"), *data.glob("bbh/*.json")]):
        definition = BUILT_IN / "bbh/cot_fewshot" / f"{file.stem}.yaml"
        if definition.is_file():
            tasks[f"bbh_cot_fewshot_{file.stem}"] = _over(definition, file, "test", field="examples")
    for file in sorted(data.glob("lambada/*.jsonl"))[:1]:
        columns = {"doc_to_text": "{{context}}", "doc_to_target": "{{' '+continuation}}",
                   "doc_to_decontamination_query": "{{context}}"}
        tasks["lambada_openai"] = _over(BUILT_IN / "lambada/lambada_openai.yaml", file, "test") | columns
    for file in sorted(data.glob("piqa/*.jsonl"))[:1]:
        columns = {"doc_to_text": "{{query}}Answer:", "doc_to_target": "gold", "doc_to_choice": "{{choices}}",
                   "doc_to_decontamination_query": "query", "training_split": None}
        tasks["piqa"] = _over(BUILT_IN / "piqa/piqa.yaml", file, "validation") | columns
    for file in data.glob("wikitext2/wiki.test.raw"):
        pages = out / "wikitext_pages.jsonl"
        pages.write_text("".join(json.dumps({"page": page}) + "\n" for page in _pages(file.read_text(encoding="utf-8"))))
        splits = {"training_split": None, "validation_split": None}
        tasks["wikitext"] = _over(BUILT_IN / "wikitext/wikitext.yaml", pages, "test") | splits
    if not tasks:
        raise UserError(f"--data: expected a folder with bbh/, lambada/, piqa/ or wikitext2/, got {str(data)!r}")
    for name, task in tasks.items():
        (out / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task}), encoding="utf-8")
    return list(tasks)


def _over(definition: Path, file: Path, split: str, **load_arguments: str) -> dict:
    return {"include": str(definition), "dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(file)}, **load_arguments}}


def _pages(text: str) -> list[str]:
    starts = [match.start() for match in PAGE.finditer(text)]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
