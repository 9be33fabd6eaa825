"""The chat through stdin: history, commands, a full context, Ctrl-C."""

import io
import signal
import threading

import pytest

from chat import Conversation, interrupts, main, say
from decdec.errors import UserError
from sampling import Sampling


class Letters:
    """A model of 40 places whose chat template writes each turn as one token a letter."""

    context = 40

    def encode_chat(self, messages):
        return [letter for message in messages for letter in message["content"]]


def test_the_oldest_turns_are_forgotten_when_the_context_is_full():
    conversation = Conversation(Letters(), "s" * 4, room=10)
    for length, want, forgotten in ((6, "ssss" + "a" * 6, 0), (8, "ssss" + "a" * 6 + "r" * 5 + "a" * 8, 0),
                                    (9, "ssss" + "a" * 8 + "r" * 5 + "a" * 9, 2), (26, "ssss" + "a" * 26, 4)):
        prompt, dropped = conversation.ask("a" * length)
        assert ("".join(prompt), dropped) == (want, forgotten)
        conversation.answered("r" * 5)
    before = list(conversation.turns)
    with pytest.raises(UserError, match="takes 31 tokens.*context of 40 leaves room for 30"):
        conversation.ask("a" * 27)
    assert conversation.turns == before
    conversation.reset()
    assert conversation.ask("a") == ([*"ssssa"], 0)


@pytest.fixture
def chat(monkeypatch, capsys):
    """Run the script's main in this process on lines of stdin; returns what it printed."""

    def run(stdin, *arguments):
        monkeypatch.setattr("sys.argv", ["chat.py", *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        main()
        return capsys.readouterr()

    return run


def test_a_conversation_through_stdin(folder, chat):
    command = ("--model", folder, "--k-chunk", 8, "--max-new-tokens", 6, "--temperature", 1)
    first = chat("Hello\nHello\n/reset\n\nHello\n/what\n/quit\nnever\n", *command)
    assert "forgot the conversation" in first.err and "/what: expected /reset or /quit" in first.err
    again = chat("Hello\nHello\n/reset\nHello\n", *command)  # ends with its input
    assert again.out == first.out and len(first.out) > 6
    long = chat("".join(f"{'x' * 200}\n" for _ in range(3)) + f"{'y' * 600}\nHello\n", *command)
    assert "forgot the oldest 2 turns" in long.err and "error: this turn takes" in long.err


def test_a_turn_that_is_no_text_is_refused(folder, monkeypatch):
    monkeypatch.setattr("sys.argv", ["chat.py", "--model", str(folder)])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="stdin: expected UTF-8 text"):
        main()


def test_the_history_is_part_of_the_prompt(folder, chat):
    command = ("--model", folder, "--max-new-tokens", 12, "--temperature", 1)
    together, alone = (chat(turns, *command).out for turns in ("Hello\nOnce\n", "Hello\n/reset\nOnce\n"))
    assert together != alone and together[:5] == alone[:5]


def test_ctrl_c_stops_the_answer_and_not_the_program(capsys):
    class Interrupted:
        """A model at whose third token the user presses Ctrl-C."""

        def answer(self, *_):
            for piece in ("a", "b", "c", "d"):
                if piece == "c":
                    signal.raise_signal(signal.SIGINT)
                yield piece

    assert say(Interrupted(), [], Sampling(), 4) == "abc"
    assert capsys.readouterr().err == " [stopped]"


def test_interrupts_are_given_back():
    before = signal.getsignal(signal.SIGINT)
    with interrupts() as event:
        assert isinstance(event, threading.Event) and not event.is_set()
    assert signal.getsignal(signal.SIGINT) is before


def test_mistakes_end_in_one_line(folder, tmp_path, chat):
    for file in folder.iterdir():
        if "chat_template" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    for arguments, match in (((tmp_path,), "chat template"), ((folder, "--max-new-tokens", 0), "max-new-tokens"),
                             ((folder / "nothing",), "model folder")):
        with pytest.raises(UserError, match=match) as error:
            chat("Hello\n", "--model", *arguments)
        assert "\n" not in str(error.value)
