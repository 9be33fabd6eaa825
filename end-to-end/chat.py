"""Chat with a DecDEC folder (or an original model) in the terminal, every decoding step compensated.

A line is your turn. /reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer. Turns that the
model's context no longer holds are forgotten, oldest first.
"""

import argparse
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from answering import LanguageModel
from decdec.errors import UserError, run
from runtime_arguments import add_runtime_arguments, add_sampling_arguments, make_runtime, sampling_of
from sampling import Sampling


class Conversation:
    """The turns so far. ``room``: how many tokens of the context are kept free for the answer."""

    def __init__(self, model: LanguageModel, system: str | None, room: int):
        self.model, self.room = model, min(room, model.context // 2)
        self._system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []

    def ask(self, text: str) -> tuple[list[int], int]:
        """The prompt after one more turn of the user, and how many of the oldest turns were forgotten for it.

        Raises UserError, and takes nothing, if the turn alone is too long.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        for start in range(0, len(turns), 2):  # a turn goes with its answer
            prompt = self.model.encode_chat(self._system + turns[start:])
            if len(prompt) + self.room <= self.model.context:
                self.turns = turns[start:]
                return prompt, start
        raise UserError(f"this turn takes {len(prompt)} tokens, but the model's context of {self.model.context} "
                        f"leaves room for {self.model.context - self.room}")

    def answered(self, text: str) -> None:
        self.turns.append({"role": "assistant", "content": text})

    def reset(self) -> None:
        self.turns = []


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets instead of ending the program: an answer stops between two tokens."""
    event = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def read_turns() -> Iterator[str]:
    """The user's lines; Ctrl-C at the prompt starts a new line."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() its history and editing keys)
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError("stdin: expected UTF-8 text") from None
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D ends the chat", file=sys.stderr)


def chat(conversation: Conversation, sampling: Sampling, max_new_tokens: int) -> None:
    """Answer the lines of stdin until they end."""
    draw = random.Random(sampling.seed)  # a seed for each answer, since one would repeat its choices
    for text in read_turns():
        if text == "/quit":
            return
        if text == "/reset":
            conversation.reset()
            print("forgot the conversation", file=sys.stderr)
        elif text.startswith("/"):
            print(f"{text.split()[0]}: expected /reset or /quit", file=sys.stderr)
        elif text:
            try:
                prompt, forgotten = conversation.ask(text)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                continue
            if forgotten:
                print(f"the context is full: forgot the oldest {forgotten} turns", file=sys.stderr)
            drawn = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, draw.getrandbits(63))
            conversation.answered(say(conversation.model, prompt, drawn, max_new_tokens))


def say(model: LanguageModel, prompt: list[int], sampling: Sampling, max_new_tokens: int) -> str:
    """Print the answer as it comes; returns as much of it as there was before it ended or Ctrl-C came."""
    said = []
    with interrupts() as stopped:
        for piece in model.answer(prompt, max_new_tokens, sampling):
            said.append(piece)
            print(piece, end="", flush=True)
            if stopped.is_set():
                print(" [stopped]", end="", file=sys.stderr, flush=True)
                break
    print(flush=True)
    return "".join(said)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_runtime_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the first turn")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default 256)")
    add_sampling_arguments(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    sampling = sampling_of(arguments)
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: expected a positive number, got {arguments.max_new_tokens}")
    model = LanguageModel(make_runtime(arguments))
    if not model.tokenizer.chat_template:
        raise UserError(f"--model: {arguments.model} has no chat template; use generate.py")
    print("/reset forgets the conversation, /quit ends it, Ctrl-C stops an answer", file=sys.stderr)
    chat(Conversation(model, arguments.system, arguments.max_new_tokens), sampling, arguments.max_new_tokens)


if __name__ == "__main__":
    run(main)
