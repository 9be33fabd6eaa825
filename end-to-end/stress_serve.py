"""Start serve.py and put it through many mixed requests from several clients: none may be lost or wrongly answered.

Two fifths are whole chats or completions, one fifth streams, one fifth is malformed, and one fifth goes away midway.
Every finished answer must equal the one that the same request got alone beforehand, and the server's memory must not
grow. Prints one JSON line; the exit status is 1 if an answer was wrong. Arguments not listed here go to serve.py.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import requests

from decdec.errors import UserError, run

KINDS = ("chat", "completion", "stream", "malformed", "gone")
PROMPTS = ("What is a tree?", "Name three colours.", "Grüße aus 東京 🌲", "1 + 1 =", "Once upon a time")
MALFORMED = (b"", b"{", b"[]", b'"text"', b"\xff\xfe", {}, {"model": None}, {"messages": "hello"}, {"messages": []},
             {"messages": [{"role": "wizard", "content": "x"}]}, {"messages": [{"role": "user"}]}, {"max_tokens": 0},
             {"max_tokens": "many"}, {"temperature": -1}, {"temperature": "hot"}, {"top_p": 2}, {"stop": ""},
             {"stop": [1]}, {"n": 2}, {"tools": [{"type": "function"}]}, {"seed": 2**70}, {"model": "another"},
             {"messages": [{"role": "user", "content": "\ud800"}]}, b"[" * 100_000, {"stream": "perhaps"},
             {"messages": [{"role": "user", "content": "word " * 100_000}]})


@contextmanager
def served(arguments: list[str]):
    """``(base URL, process id)`` of a server on a free port, ended at the end."""
    script = Path(__file__).with_name("serve.py")
    command = [sys.executable, str(script), "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        if "http" not in line:
            raise UserError("serve.py did not start; its own line is above")
        url = line.split()[-1]
        while process.poll() is None:
            try:
                requests.get(f"{url}/models", timeout=60).raise_for_status()
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(timeout=60)


def resident_bytes(pid: int) -> int:
    """What a process holds in memory, as Linux counts it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


class Caller:
    """Makes the requests of one stress, and knows the right answers."""

    def __init__(self, url: str, max_tokens: int):
        self.url, self.max_tokens = url, max_tokens
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        self.model = self.client.models.list().data[0].id
        self.right = {(kind, prompt): self._answer(kind, prompt)
                      for kind in ("chat", "completion") for prompt in PROMPTS}
        for body in MALFORMED:  # the longest of them needs memory that the server keeps
            self._malformed(body)

    def _settings(self, prompt: str) -> dict:
        sampled = PROMPTS.index(prompt) % 2
        return {"model": self.model, "max_tokens": self.max_tokens, "temperature": float(sampled), "seed": 7}

    def _chat(self, prompt: str, **more):
        return self.client.chat.completions.create(messages=[{"role": "user", "content": prompt}],
                                                   **self._settings(prompt), **more)

    def _answer(self, kind: str, prompt: str) -> tuple[str, int]:
        """Text and number of tokens."""
        if kind == "chat":
            found = self._chat(prompt)
            return found.choices[0].message.content, found.usage.completion_tokens
        if kind == "completion":
            found = self.client.completions.create(prompt=prompt, **self._settings(prompt))
            return found.choices[0].text, found.usage.completion_tokens
        chunks = list(self._chat(prompt, stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        return text, chunks[-1].usage.completion_tokens

    def request(self, number: int) -> str:
        """Make the request of this number; ``"right"``, or what was wrong with its answer."""
        draw = random.Random(number)
        kind, prompt = KINDS[number % len(KINDS)], draw.choice(PROMPTS)
        try:
            if kind == "malformed":
                return self._malformed(MALFORMED[number // len(KINDS) % len(MALFORMED)])
            if kind == "gone":
                return self._go_away(prompt, draw.randrange(4))
            right = self.right["completion" if kind == "completion" else "chat", prompt]
            return "right" if self._answer(kind, prompt) == right else f"{kind}: another answer than before"
        except (openai.OpenAIError, requests.RequestException) as error:
            return f"{kind}: {type(error).__name__}: {str(error)[:200]}"

    def _malformed(self, body: bytes | dict) -> str:
        """An error of the 400s in the API's form is right."""
        if isinstance(body, dict):
            whole = {"model": self.model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
            body = json.dumps(whole | body if body else {}).encode()
        answer = requests.post(f"{self.url}/chat/completions", data=body, timeout=600,
                               headers={"content-type": "application/json"})
        fine = 400 <= answer.status_code < 500 and isinstance(answer.json()["error"]["message"], str)
        return "right" if fine else f"malformed: {body[:60]!r}: {answer.status_code} {answer.text[:100]}"

    def _go_away(self, prompt: str, events: int) -> str:
        """Read so many events of a long stream, then hang up; of a whole answer, before it comes."""
        if not events:
            try:
                body = {"model": self.model, "prompt": prompt, "max_tokens": 10_000}
                requests.post(f"{self.url}/completions", json=body, timeout=(60, 0.2))
            except requests.ReadTimeout:
                pass
            return "right"
        with self._chat(prompt, stream=True) as stream:
            for _ in zip(range(events), stream):
                pass
        return "right"


def stress(arguments: list[str], count: int, clients: int, max_tokens: int) -> dict:
    with served(arguments) as (url, pid):
        caller = Caller(url, max_tokens)
        start, memory, outcome = time.perf_counter(), [], Counter()
        with ThreadPoolExecutor(clients) as pool:
            # Four rounds: the first warms allocators and caches up, the others must not add to it.
            for part in range(4):
                outcome.update(pool.map(caller.request, range(part * count // 4, (part + 1) * count // 4)))
                memory.append(resident_bytes(pid))
        waiting = requests.get(url.removesuffix("/v1") + "/health", timeout=60).json()["waiting"]
        wrong = {verdict: times for verdict, times in outcome.items() if verdict != "right"}
        return {"bench": "stress_serve", "model": caller.model, "requests": count, "clients": clients,
                "right": outcome["right"], "wrong": wrong, "left_waiting": waiting,
                "seconds": round(time.perf_counter() - start, 1),
                "memory_mb_by_quarter": [round(size / 1e6, 1) for size in memory]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="default 200")
    parser.add_argument("--clients", type=int, default=8, metavar="N", help="at the same time (default 8)")
    parser.add_argument("--max-tokens", type=int, default=8, metavar="N", help="of each answer (default 8)")
    arguments, for_server = parser.parse_known_args()
    for name in ("requests", "clients", "max_tokens"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected a positive number, got {getattr(arguments, name)}")
    row = stress(for_server, arguments.requests, arguments.clients, arguments.max_tokens)
    print(json.dumps(row))
    if row["wrong"] or row["left_waiting"]:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
