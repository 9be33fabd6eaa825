import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mt_bench_judge
import pytest
from mt_bench_answer import TEMPERATURE, answer, model_id, read_answers
from subject import SUBJECT_KEY, Setting, Subject
from tiny_data import QUESTIONS

from decdec import artifacts, models
from decdec.errors import UserError
from decdec.files import read_rows

EVALUATION = Path(__file__).parents[1]


@pytest.fixture
def judge(monkeypatch):
    """A judge on this machine that answers with ``judge.status`` and ``judge.text``, and keeps what it was asked."""
    class Judge(BaseHTTPRequestHandler):
        def do_POST(self):
            server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))) | {"path": self.path,
                                "key": self.headers["Authorization"]})
            status = server.statuses.pop(0) if server.statuses else 200
            body = json.dumps({"choices": [{"message": {"content": server.text}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.asked, server.statuses, server.text = [], [], "Fine. Rating: [[7]]"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("JUDGE_MODEL", "some/judge")
    monkeypatch.setattr(mt_bench_judge.time, "sleep", lambda seconds: None)
    yield server
    server.shutdown()


def run_judge(monkeypatch, folder, data, out):
    bench = data / "mt_bench"
    monkeypatch.setattr(sys, "argv", ["mt_bench_judge.py", str(folder), "--questions", str(bench / "question.jsonl"), "--prompts",
                                      str(bench / "judge_prompts.jsonl"), "--references",
                                      str(bench / "reference_answer/gpt-4.jsonl"), "--out", str(out)])
    mt_bench_judge.main()


@pytest.fixture
def answers(everything, tmp_path):
    """The tiny run's answers, in a folder without judgments."""
    out = tmp_path / "mt_bench/model_answer"
    out.mkdir(parents=True)
    for file in (everything / "mt_bench/model_answer").iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out.parent


def test_answers_are_in_fastchats_form(everything):
    files = {file.stem: read_rows(file) for file in (everything / "mt_bench/model_answer").iterdir()}
    assert set(files) == {"tiny", "tiny-rtn-w3-k0", "tiny-rtn-w3-k16"}
    for name, rows in files.items():
        assert [row["question_id"] for row in rows] == [1]  # the tiny form asks one question
        for row in rows:
            assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} <= set(row) and row["model_id"] == name
            assert row["choices"][0]["index"] == 0 and len(row["choices"][0]["turns"]) == 2
    assert files["tiny-rtn-w3-k16"][0]["setting"]["compensated"] == "generated tokens"


def test_fastchat_prints_the_table(everything):
    judged = everything / "mt_bench/model_judgment/stand-in_single.jsonl"
    result = subprocess.run([sys.executable, "-m", "fastchat.llm_judge.show_result", "--input-file", judged], capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    average = result.stdout.split("Average")[1]
    scores = {row["model_id"]: row["score"] for row in read_rows(everything / "mt_bench.jsonl")}
    printed = {line.split()[0]: float(line.split()[1]) for line in average.splitlines() if line.startswith("tiny")}
    assert printed == pytest.approx(scores, abs=1e-3)


def test_the_second_turn_sees_the_first_and_categories_set_the_temperature(original, monkeypatch):
    model, tokenizer = models.load_model(str(original)).float(), models.load_tokenizer(str(original))
    calls = []
    real = model.generate

    def generate(ids, **options):
        calls.append((tokenizer.decode(ids[0]), options))
        return real(ids, **options)

    monkeypatch.setattr(model, "generate", generate)
    first = answer(model, tokenizer, QUESTIONS[0], 5, seed=0)
    assert "rain" in calls[0][0] and "snow" not in calls[0][0]
    assert "rain" in calls[1][0] and "snow" in calls[1][0] and first[0] in calls[1][0]
    assert calls[0][1]["temperature"] == TEMPERATURE["writing"] == 0.7 and calls[0][1]["do_sample"]
    assert answer(model, tokenizer, QUESTIONS[0], 5, seed=0) == first
    answer(model, tokenizer, QUESTIONS[1], 5, seed=0)
    assert not calls[-1][1]["do_sample"]


def test_judging_resumes_and_uses_references(judge, answers, data, tmp_path, monkeypatch):
    out = tmp_path / "scores.jsonl"
    judge.statuses = [200, 200, 429, 200, 401]
    with pytest.raises(UserError, match="401"):
        run_judge(monkeypatch, answers, data, out)
    judged = answers / "model_judgment/some_judge_single.jsonl"
    assert len(read_rows(judged)) == 3 and len(read_rows(out)) == 1  # the first model's two turns, one of the second's
    run_judge(monkeypatch, answers, data, out)
    rows = read_rows(judged)
    assert len(rows) == 6 == len({(row["question_id"], row["model"], row["turn"]) for row in rows})
    assert {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"} <= set(rows[0])
    assert judge.asked[0]["path"] == "/v1/chat/completions" and judge.asked[0]["key"] == "Bearer secret"
    assert judge.asked[0]["model"] == "some/judge" and judge.asked[0]["temperature"] == 0
    asked = len(judge.asked)
    run_judge(monkeypatch, answers, data, out)
    assert len(judge.asked) == asked and len(read_rows(out)) == 3 and {row["score"] for row in read_rows(out)} == {7}


def test_maths_is_judged_with_the_reference(data):
    prompts = {row["name"]: row for row in read_rows(data / "mt_bench/judge_prompts.jsonl")}
    name, _, prompt = mt_bench_judge.build_prompt(prompts, QUESTIONS[1], ["five", "ten"], ["5", "10"], 2)
    assert name == "single-math-v1-multi-turn" and prompt.splitlines() == ["5", "10", "What is 2 + 3?", "five", "And twice that?", "ten"]
    assert mt_bench_judge.build_prompt(prompts, QUESTIONS[0], ["a", "b"], None, 1)[0] == "single-v1"


def put_answers(folder, *rows):
    (folder / "model_answer").mkdir(parents=True, exist_ok=True)
    (folder / "model_answer/m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_cannot_be_judged_is_told(judge, data, tmp_path, monkeypatch):
    reply = {"question_id": 99, "model_id": "m", "choices": [{"index": 0, "turns": ["a", "b"]}], "setting": {}, "max_new_tokens": 8}
    put_answers(tmp_path)
    with pytest.raises(UserError, match="folder: expected one with"):
        run_judge(monkeypatch, tmp_path, data, tmp_path / "scores.jsonl")
    put_answers(tmp_path, reply)
    with pytest.raises(UserError, match="--questions: has no question 99, which m answered"):
        run_judge(monkeypatch, tmp_path, data, tmp_path / "scores.jsonl")
    put_answers(tmp_path, reply | {"question_id": QUESTIONS[0]["question_id"]})
    judge.text = None
    with pytest.raises(UserError, match="an answer that is not in OpenAI's form"):
        run_judge(monkeypatch, tmp_path, data, tmp_path / "scores.jsonl")
    put_answers(tmp_path, reply | {"question_id": QUESTIONS[1]["question_id"]})
    bare = tmp_path / "data/mt_bench"
    shutil.copytree(data / "mt_bench", bare)
    (bare / "reference_answer/gpt-4.jsonl").write_text("")
    with pytest.raises(UserError, match="--references: has no answer to question"):
        run_judge(monkeypatch, tmp_path, bare.parent, tmp_path / "scores.jsonl")


def test_answers_of_other_settings_are_not_taken(tmp_path):
    setting = dict.fromkeys((*SUBJECT_KEY, "compensated"), "s") | {"repair": None}
    put_answers(tmp_path, {"question_id": 1, "setting": setting | {"torch": "2"}, "max_new_tokens": 8})
    path = tmp_path / "model_answer/m.jsonl"
    assert read_answers(path, setting | {"torch": "3"}, 8) == {1} and read_answers(tmp_path / "none", setting, 8) == set()
    put_answers(tmp_path, {"question_id": 1, "setting": {"model": "s", "weights_hash": None}, "max_new_tokens": 8})
    assert read_answers(path, setting, 8) == {1}  # answered before settings held more
    put_answers(tmp_path, {"question_id": 1, "setting": setting, "max_new_tokens": 8})
    for change, tokens in (({"weights_hash": "other"}, 8), ({}, 16)):
        with pytest.raises(UserError, match="--out: .* holds answers with"):
            read_answers(path, setting | change, tokens)


def test_the_name_tells_a_repair(folder):
    subject = Subject(str(folder), artifacts.read_quant_config(folder), None, "float32", "cpu", 0)
    row = subject.compensated_rows("mt_bench", [Setting()])[0]
    assert model_id(subject, row, Setting(), False) == "tiny-rtn-w3-k0"
    assert model_id(subject, row | {"repair": "0123456789"}, Setting(repair=True), False) == "tiny-rtn-w3-k0-repair012345"


@pytest.mark.parametrize(("judgment", "score"), [("Rating: [[8]]", 8), ("[[7.5]] good", 7.5), ("[6]", 6), ("no rating", -1)])
def test_ratings(judgment, score):
    assert mt_bench_judge.score(judgment) == score


def test_a_judge_that_is_not_there_is_one_clear_error(judge, answers, data, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="OPENAI_BASE_URL: http://127.0.0.1:9/v1/chat/completions gave ConnectionError"):
        run_judge(monkeypatch, answers, data, tmp_path / "scores.jsonl")
    assert not (tmp_path / "scores.jsonl").exists()
