"""Data of a few lines in every benchmark's own format, and made-up kernel times: enough for each stage to run in seconds."""

import argparse
import json
from pathlib import Path

from decdec.errors import run

QUESTIONS = [{"question_id": 1, "category": "writing", "turns": ["Write a line about rain.", "Now about snow."]},
             {"question_id": 2, "category": "math", "turns": ["What is 2 + 3?", "And twice that?"]}]
TEMPLATES = {"single-v1": "{question}\n{answer}", "single-math-v1": "{question}\n{ref_answer_1}\n{answer}",
             "single-v1-multi-turn": "{question_1}\n{answer_1}\n{question_2}\n{answer_2}",
             "single-math-v1-multi-turn": "{ref_answer_1}\n{ref_answer_2}\n{question_1}\n{answer_1}\n{question_2}\n{answer_2}"}


def kernel_rows() -> list[dict]:
    """Times after the paper's law: flat to the knee, then linear, with another slope for every n_tb."""
    device = {"sms": 20, "batch": 1, "device": "made up"}
    rows = [{"bench": "device copy", "gbps": 192} | device, {"bench": "link gather", "gbps": 16} | device]
    for d_in, d_out, base in ((4096, 4096, 35.0), (4096, 28672, 230.0), (14336, 4096, 115.0)):
        for n_tb in (2, 8, 16):
            for k_chunk in (0, 16, 32, 64, 96, 128):
                fetch = k_chunk * d_in / 1024 * d_out / 2 / 16e3 * max(1, 8 / n_tb)
                rows.append({"bench": "compensated" if k_chunk else "base", "format": "codebook", "bits": 3, "d_in": d_in, "d_out": d_out,
                             "k_chunk": k_chunk, "n_tb": n_tb if k_chunk else 0, "us": max(base, fetch)} | device)
    return rows


def write(folder: Path) -> None:
    def lines(path: str, rows: list[dict]) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    (folder / "bbh").mkdir(parents=True, exist_ok=True)
    for task, examples in {"boolean_expressions": [("True and not False is", "True"), ("not True is", "False")],
                           "navigate": [("Take 1 step. Turn around. Take 1 step.\nOptions:\n- Yes\n- No", "Yes")]}.items():
        content = {"examples": [{"input": question, "target": answer} for question, answer in examples]}
        (folder / "bbh" / f"{task}.json").write_text(json.dumps(content), encoding="utf-8")
    lines("lambada/lambada.jsonl", [{"context": "She opened the door and closed the", "continuation": "door"}])
    lines("piqa/piqa.jsonl", [{"query": "Question: How is tea made?\n", "choices": ["With hot water.", "With sand."], "gold": 0}])
    (folder / "wikitext2").mkdir(exist_ok=True)
    (folder / "wikitext2/wiki.test.raw").write_text(" \n = A page = \n \n Some words . \n = Another = \n \n More words . \n")
    lines("mt_bench/question.jsonl", QUESTIONS)
    lines("mt_bench/judge_prompts.jsonl", [{"name": name, "system_prompt": "Rate.", "prompt_template": template}
                                           for name, template in TEMPLATES.items()])
    lines("mt_bench/reference_answer/gpt-4.jsonl", [{"question_id": 2, "choices": [{"index": 0, "turns": ["5", "10"]}]}])
    lines("kernels.jsonl", kernel_rows())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="where the data are written")
    folder = Path(parser.parse_args().folder)
    write(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    run(main)
