"""The server as the official client sees it: answers, streams, errors, many clients at once."""

import json
import socket
import threading
import time
from pathlib import Path

import openai
import pytest
import requests
import uvicorn

from answering import LanguageModel
from api import build_app
from decdec.errors import UserError
from decdec.linear import Compensation
from decdec.testing import run_script
from runtime import Runtime
from serve import bind, main

ROOM = Path(__file__).parents[1]
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model(folder):
    return LanguageModel(Runtime(folder, Compensation(8), "cpu"))


@pytest.fixture(scope="module")
def url(model):
    """The server in a thread of this process."""
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(build_app(model, "tiny"), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def text_of(model, prompt, tokens):
    """What the model says to ``prompt``, without the server."""
    answer = model.answer(prompt, tokens)
    return "".join(answer), answer


def test_chats_and_completions_are_the_models_own_whole_and_streamed(client, model):
    for prompt, chat in ((model.encode_chat(HELLO), True), (model.encode("Once"), False)):
        want, answer = text_of(model, prompt, 12)
        route = client.chat.completions if chat else client.completions
        settings = {"messages": HELLO} if chat else {"prompt": "Once"}
        settings |= {"model": "tiny", "max_tokens": 12, "temperature": 0}
        whole = route.create(**settings)
        choice = whole.choices[0]
        assert (choice.message.content if chat else choice.text) == want
        assert choice.finish_reason == answer.finish_reason
        usage = whole.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), answer.new_tokens)
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens

        chunks = list(route.create(stream=True, stream_options={"include_usage": True}, **settings))
        pieces = [(c.choices[0].delta.content if chat else c.choices[0].text) or "" for c in chunks if c.choices]
        assert "".join(pieces) == want and chunks[-1].usage == usage and not chunks[-1].choices
        assert chunks[-2].choices[0].finish_reason == answer.finish_reason and len({c.id for c in chunks}) == 1
        assert not chat or chunks[0].choices[0].delta.role == "assistant"


def test_the_readmes_client(url, capsys):
    readme = (ROOM / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0].replace("http://127.0.0.1:8000", url)
    exec(code.replace("max_tokens=40", "max_tokens=40, seed=1"), {})
    assert len(capsys.readouterr().out) > 1


def test_models_and_health(client, url):
    assert [entry.id for entry in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    health = requests.get(f"{url}/health", timeout=10)
    assert health.status_code == 200 and health.json()["status"] == "ok"


def test_settings_reach_the_sampling(client):
    def ask(**settings):
        return client.completions.create(model="tiny", prompt="ab", max_tokens=20, **settings).choices[0].text

    assert ask(seed=3) == ask(seed=3) != ask(seed=4)
    assert ask() != ask()  # no seed: drawn afresh
    assert ask(seed=3, top_p=1e-6) == ask(temperature=0) == ask(seed=5, extra_body={"top_k": 1})
    assert ask(temperature=0) == client.completions.create(model="tiny", prompt=[[67, 68]], max_tokens=20, user="x",
                                                           temperature=0).choices[0].text  # tokens of "ab"


def test_an_answer_stops_before_a_stop_string(client):
    settings = {"model": "tiny", "prompt": "ab", "max_tokens": 30, "seed": 11}
    text = client.completions.create(**settings).choices[0].text
    stop = text[6:8]
    wanted = text[:text.index(stop)]
    whole = client.completions.create(stop=["never this", stop], **settings)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (wanted, "stop")
    assert whole.usage.completion_tokens < 30
    assert "".join(c.choices[0].text for c in client.completions.create(stop=stop, stream=True, **settings)) == wanted


def test_the_context_ends_an_answer(client, model):
    settings = {"model": "tiny", "prompt": "x" * (model.context - 3), "temperature": 0}
    found = client.completions.create(max_tokens=50, **settings)
    assert found.choices[0].finish_reason == "length" and found.usage.total_tokens == model.context


@pytest.mark.parametrize("change, match", [
    ({"n": 2}, "n: expected 1"), ({"tools": [{"type": "function"}]}, "tools"), ({"logprobs": True}, "logprobs"),
    ({"response_format": {"type": "json_object"}}, "response_format"), ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": 3}, "temperature"), ({"top_p": 0}, "top_p"), ({"stop": [""]}, "stop"), ({"seed": 2**70}, "seed"),
    ({"extra_body": {"top_k": 2**70}}, "top_k"), ({"extra_body": {"min_p": 0.1}}, "min_p"), ({"tool_choice": "required"}, "tool_choice"),
    ({"extra_body": {"repetition_penalty": 1.2}}, "repetition_penalty"), ({"extra_body": {"ignore_eos": True}}, "ignore_eos"),
    ({"extra_body": {"stop_token_ids": [1]}}, "stop_token_ids"), ({"extra_body": {"min_tokens": 1}}, "min_tokens"),
    ({"messages": []}, "messages"), ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0"),
    ({"messages": [{"role": "user", "content": "x" * 505}]}, "messages: 523 tokens, but the model's context is 512"),
    ({"messages": [{"role": "user", "content": "x" * 9000}]}, "at least"),
])
def test_what_cannot_be_done_is_refused_in_the_apis_form(client, change, match):
    settings = {"model": "tiny", "messages": HELLO, "max_tokens": 2} | change
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**settings)
    body = error.value.body
    assert ("x" * 400 in str(change)) == (body["code"] == "context_length_exceeded")
    assert match in body["message"] and body["type"] == "invalid_request_error" and "\n" not in body["message"]
    assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2).choices  # and it goes on


def test_other_mistakes(client, url):
    for prompt, match in ((["a", "b"], "one prompt"), ([5000], "below 258"), ([], "prompt")):
        with pytest.raises(openai.BadRequestError, match=match):
            client.completions.create(model="tiny", prompt=prompt)
    with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
        client.completions.create(model="large", prompt="x")
    for body in (b"", b"{", b"\xff", b"[]", b"NaN", b"[" * 99_999, b'{"model": "tiny", "prompt": "\\ud800"}'):
        answer = requests.post(f"{url}/v1/completions", data=body, timeout=10,
                               headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error", body
    for path, status in (("/v1/nothing", 404), ("/v1/completions", 405)):
        answer = requests.get(url + path, timeout=10)
        assert answer.status_code == status and path in answer.json()["error"]["message"]


def test_many_clients_at_once_lose_nothing(folder):
    result = run_script(ROOM / "stress_serve.py", "--requests", 40, "--model", folder, "--k-chunk", 8)
    assert result.returncode == 0, result.stdout + result.stderr
    row = json.loads(result.stdout)
    assert (row["right"], row["wrong"], row["left_waiting"], row["model"]) == (40, {}, 0, "tiny-w3")
    assert row["memory_mb_by_quarter"][-1] - row["memory_mb_by_quarter"][0] < 20


def test_a_client_that_hangs_up_frees_the_engine(client, url, model, slow_answers, monkeypatch):
    slow = slow_answers[0]
    monkeypatch.setattr(model, "answer", lambda *_: slow)
    with client.completions.create(model="tiny", prompt="x", stream=True) as stream:
        next(iter(stream))
    with pytest.raises(requests.ReadTimeout):
        requests.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "x"}, timeout=(60, 0.2))
    monkeypatch.undo()
    start = time.monotonic()
    client.completions.create(model="tiny", prompt="x", max_tokens=1)
    assert time.monotonic() - start < 10 and slow.new_tokens < slow.most


def test_a_taken_port_and_other_mistakes_end_in_one_line(folder, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, match in (((folder, "--port", port), f"127.0.0.1:{port}: .*in use"),
                                 ((folder, "--port", 70_000), "cannot listen"),
                                 ((folder, "--port", 0, "--host", "a..b"), "cannot listen"),
                                 ((folder, "--port", 0, "--queue", 0), "queue"),
                                 ((folder / "nothing", "--port", 0), "model folder")):
            monkeypatch.setattr("sys.argv", ["serve.py", "--model", *map(str, arguments)])
            with pytest.raises(UserError, match=match) as error:
                main()
            assert "\n" not in str(error.value)
