"""Answers to MT-Bench's questions by an original model or a DecDEC folder, in FastChat's file format.

Each question has two turns; the temperature follows its category, as in FastChat. Decoding steps are compensated, prompts are
not unless --compensate-prompt says so. Answers are appended to OUT/model_answer/MODEL_ID.jsonl, one line a question; a question
that is answered already is passed over.
"""

import argparse
import time
import uuid
import zlib
from pathlib import Path

import torch
from subject import SUBJECT_KEY, Setting, Subject, add_arguments, add_settings, from_arguments
from tqdm import tqdm

from decdec import hub, models
from decdec.errors import UserError, run
from decdec.files import append_row, read_rows

TEMPERATURE = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # every other category: 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    add_settings(parser)
    parser.add_argument("--questions", required=True, help="FastChat's question.jsonl")
    parser.add_argument("--limit", type=int, help="first questions (default all)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest answer (default 1024)")
    parser.add_argument("--compensate-prompt", action="store_true", help="compensate prompts as well")
    parser.add_argument("--out", default="evaluation/results/mt_bench", help="folder of model_answer/ and model_judgment/")
    arguments = parser.parse_args()
    for name in ("limit", "max_new_tokens"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected a positive number, got {value}")
    return arguments


def read_questions(path: str) -> list[dict]:
    questions = read_rows(path)
    if not questions or not all({"question_id", "category", "turns"} <= set(question) for question in questions):
        raise UserError(f"--questions: expected FastChat's question.jsonl, got {path!r}")
    return questions


def read_answers(path: Path, setting: dict, max_new_tokens: int) -> set[int]:
    """The questions that are answered in ``path``; a UserError if they were answered in another setting."""
    found = read_rows(path)
    for known in found:
        wanted = {name: setting[name] for name in (*SUBJECT_KEY, "compensated")} | {"max_new_tokens": max_new_tokens}
        answered = known["setting"] | {"max_new_tokens": known["max_new_tokens"]}
        for name, value in wanted.items():
            if answered.get(name) not in (None, value):  # None: answered before settings held it
                raise UserError(f"--out: {path} holds answers with {name} {answered[name]}, not {value}; give another folder")
    return {known["question_id"] for known in found}


def model_id(subject: Subject, row: dict, setting: Setting, compensate_prompt: bool) -> str:
    """A name for FastChat's tables that tells the settings apart."""
    if subject.quant is None:
        parts = [row["model"]]
    else:
        bits = "3.5" if row["bits"] == [3, 4] else row["bits"]
        parts = [row["model"], row["method"], f"w{bits}", f"k{setting.k_chunk}"]
    parts += [setting.selection] if setting.selection not in ("none", "bucket") else []
    parts += [f"r{row['residual_bits']}"] if row["residual_bits"] not in (None, 4) else []
    parts += ["nested"] if row["nested"] else []
    parts += [f"repair{row['repair'][:6]}"] if row["repair"] else []
    parts += ["prompt"] if setting.k_chunk and compensate_prompt else []
    return "-".join(map(str, parts + ([f"seed{subject.seed}"] if subject.seed else [])))


@torch.inference_mode()
def answer(model: torch.nn.Module, tokenizer, question: dict, max_new_tokens: int, seed: int) -> list[str]:
    """The model's replies to the question's turns, each given the conversation so far."""
    messages, replies = [], []
    temperature = TEMPERATURE.get(question["category"], 0.0)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    torch.manual_seed(zlib.crc32(f"{question['question_id']} {seed}".encode()))
    for turn in question["turns"]:
        messages.append({"role": "user", "content": turn})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")["input_ids"]
        room = model.config.max_position_embeddings - ids.shape[1]
        reply = ""
        if room > 0:
            generated = model.generate(ids.to(model.device), max_new_tokens=min(max_new_tokens, room), **sampling,
                                       pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id)
            reply = tokenizer.decode(generated[0, ids.shape[1]:], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": reply})
        replies.append(reply)
    return replies


def main() -> None:
    arguments = parse_arguments()
    questions = read_questions(arguments.questions)[:arguments.limit]
    subject = from_arguments(arguments)
    settings = subject.settings(arguments.selection, arguments.k_chunk)
    tokenizer = models.load_tokenizer(arguments.model)
    if tokenizer.chat_template is None:
        raise UserError(f"--model: {arguments.model} has no chat template; MT-Bench needs a chat model")
    model = None
    for setting, row in zip(settings, subject.compensated_rows("mt_bench", settings), strict=True):
        row["compensated"] = "none" if not setting.k_chunk else "every position" if arguments.compensate_prompt else "generated tokens"
        name = model_id(subject, row, setting, arguments.compensate_prompt)
        path = Path(arguments.out) / "model_answer" / f"{name}.jsonl"
        answered = read_answers(path, row, arguments.max_new_tokens)
        for question in tqdm([question for question in questions if question["question_id"] not in answered], desc=name):
            model = model or subject.load()
            if subject.quant is not None:
                hub.set_compensation(model, setting.compensation(subject.seed, prefill=arguments.compensate_prompt))
            turns = answer(model, tokenizer, question, arguments.max_new_tokens, subject.seed)
            append_row(path, {"question_id": question["question_id"], "answer_id": uuid.uuid4().hex[:22], "model_id": name,
                              "choices": [{"index": 0, "turns": turns}], "tstamp": time.time(),
                              "max_new_tokens": arguments.max_new_tokens, "setting": row})
        print(f"{name}: {len(questions)} questions answered in {path}")


if __name__ == "__main__":
    run(main)
