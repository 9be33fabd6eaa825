"""Judges MT-Bench answers with any endpoint that speaks OpenAI's protocol, in FastChat's file format.

The environment names the judge: OPENAI_BASE_URL (default https://api.openai.com/v1), OPENAI_API_KEY and JUDGE_MODEL (default
gpt-4o, the paper's). Single-answer grading, each turn by itself, with FastChat's prompts; maths, reasoning and coding get the
reference answers. Judgments go to FOLDER/model_judgment/JUDGE_single.jsonl, one line a question and turn, and one that is there
already is not asked for again. When every answer of a model is judged, its mean score is appended to --out as one row.
FastChat prints the table: python -m fastchat.llm_judge.show_result --input-file FOLDER/model_judgment/JUDGE_single.jsonl
"""

import argparse
import os
import re
import time
from pathlib import Path

import requests
from mt_bench_answer import read_questions
from subject import SUBJECT_KEY, Rows
from tqdm import tqdm

from decdec.errors import UserError, run
from decdec.files import append_row, read_rows

NEED_REFERENCE = ("math", "reasoning", "coding")
TRIES, PATIENCE = 5, 120  # attempts, and seconds to wait for each
KEY = (*SUBJECT_KEY, "model_id", "judge", "questions")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder with model_answer/, written by mt_bench_answer.py")
    parser.add_argument("--questions", required=True, help="FastChat's question.jsonl")
    parser.add_argument("--prompts", required=True, help="FastChat's judge_prompts.jsonl")
    parser.add_argument("--references", required=True, help="FastChat's reference_answer/gpt-4.jsonl")
    parser.add_argument("--out", default="evaluation/results/mt_bench.jsonl", help="JSON-lines file of mean scores")
    return parser.parse_args()


def ask(judge: str, system: str, prompt: str) -> str:
    """One completion at temperature 0; busy servers are asked again, refusals end the run."""
    url = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/") + "/chat/completions"
    body = {"model": judge, "temperature": 0, "max_tokens": 2048,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": prompt}]}
    problem = ""
    for attempt in range(TRIES):
        try:
            reply = requests.post(url, json=body, timeout=PATIENCE,
                                  headers={"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"})
            if reply.ok:
                content = reply.json()["choices"][0]["message"]["content"]
                if isinstance(content, str):
                    return content
                raise TypeError
            problem = f"{reply.status_code} {reply.reason}"
            if reply.status_code not in (408, 409, 429) and reply.status_code < 500:
                break
        except requests.RequestException as error:
            problem = type(error).__name__
        except (KeyError, IndexError, TypeError, ValueError):
            problem = "an answer that is not in OpenAI's form"
        time.sleep(0.5 * 2**attempt if attempt + 1 < TRIES else 0)
    raise UserError(f"OPENAI_BASE_URL: {url} gave {problem}; what is judged so far is kept")


def score(judgment: str) -> float:
    """The rating in ``[[5]]`` or ``[5]``; -1, which FastChat leaves out, if there is none."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", judgment) or re.search(r"\[(\d+\.?\d*)\]", judgment)
    return float(found.group(1)) if found else -1


def build_prompt(prompts: dict, question: dict, replies: list[str], reference: list[str] | None, turn: int) -> tuple[str, str, str]:
    """(name of the template, system prompt, user prompt) for judging ``turn`` 1 or 2."""
    name = ("single-math-v1" if reference else "single-v1") + ("-multi-turn" if turn == 2 else "")
    fields = {"question": question["turns"][0], "answer": replies[0]}
    if turn == 2:
        fields = {"question_1": question["turns"][0], "question_2": question["turns"][1], "answer_1": replies[0],
                  "answer_2": replies[1]}
    if reference:
        fields |= {"ref_answer_1": reference[0], "ref_answer_2": reference[1]}
    return name, prompts[name]["system_prompt"], prompts[name]["prompt_template"].format(**fields)


def judge_model(judge: str, path: Path, answers: list[dict], questions: dict, prompts: dict, references: dict) -> None:
    known = {(row["question_id"], row["model"], row["turn"]) for row in read_rows(path)}
    todo = [(reply, turn) for reply in answers for turn in (1, 2)
            if (reply["question_id"], reply["model_id"], turn) not in known]
    for reply, turn in tqdm(todo, desc=answers[0]["model_id"]):
        question = questions.get(reply["question_id"])
        if question is None:
            raise UserError(f"--questions: has no question {reply['question_id']}, which {reply['model_id']} answered")
        reference = references.get(question["question_id"]) if question["category"] in NEED_REFERENCE else None
        if reference is None and question["category"] in NEED_REFERENCE:
            raise UserError(f"--references: has no answer to question {question['question_id']}")
        name, system, prompt = build_prompt(prompts, question, reply["choices"][0]["turns"], reference, turn)
        judgment = ask(judge, system, prompt)
        append_row(path, {"question_id": question["question_id"], "model": reply["model_id"], "judge": [judge, name],
                          "user_prompt": prompt, "judgment": judgment, "score": score(judgment), "turn": turn, "tstamp": time.time()})


def mean_row(judge: str, path: Path, answers: list[dict]) -> dict:
    """Mean scores of a model; judgments without a rating count as failed and are left out, as in FastChat's table."""
    name = answers[0]["model_id"]
    judged = [row for row in read_rows(path) if row["model"] == name]
    rated = {turn: [row["score"] for row in judged if row["turn"] == turn and row["score"] != -1] for turn in (1, 2)}
    both = rated[1] + rated[2]
    means = {key: round(sum(values) / len(values), 4) if values else None
             for key, values in (("score", both), ("first_turn", rated[1]), ("second_turn", rated[2]))}
    return answers[0]["setting"] | {"model_id": name, "judge": judge, "questions": len(answers), **means,
                                    "failed": len(judged) - len(both), "max_new_tokens": answers[0]["max_new_tokens"]}


def main() -> None:
    arguments = parse_arguments()
    judge = os.environ.get("JUDGE_MODEL", "gpt-4o")
    questions = {question["question_id"]: question for question in read_questions(arguments.questions)}
    prompts = {row["name"]: row for row in read_rows(arguments.prompts)}
    if "single-v1" not in prompts:
        raise UserError(f"--prompts: expected FastChat's judge_prompts.jsonl, got {arguments.prompts!r}")
    references = {row["question_id"]: row["choices"][0]["turns"] for row in read_rows(arguments.references)}
    by_model = [answers for file in sorted((Path(arguments.folder) / "model_answer").glob("*.jsonl")) if (answers := read_rows(file))]
    if not by_model:
        raise UserError(f"folder: expected one with model_answer/*.jsonl, got {arguments.folder!r}")
    path = Path(arguments.folder) / "model_judgment" / f"{judge.replace('/', '_')}_single.jsonl"
    rows = Rows(arguments.out, KEY)
    for answers in by_model:
        judge_model(judge, path, answers, questions, prompts, references)
        row = mean_row(judge, path, answers)
        if rows.find(row) is None:
            rows.append(row)
        print(f"{row['model_id']}: {row['score']} ({row['first_turn']}, {row['second_turn']}) by {judge}, {row['failed']} failed")
    print(f"judgments are in {path}")


if __name__ == "__main__":
    run(main)
