"""Text in, text out: a model with its tokenizer, as chat.py and serve.py use it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import jinja2

from decdec import models
from decdec.errors import UserError
from generate import check_text, encode
from runtime import Runtime
from sampling import Sampling
from streaming import TextStream


class TooLong(UserError):
    """A prompt that the model's context does not hold."""


class LanguageModel:
    """A runtime with its tokenizer, for one sequence at a time."""

    def __init__(self, runtime: Runtime):
        self.runtime, self.tokenizer = runtime, models.load_tokenizer(runtime.source)
        self._longest_token = max(map(len, self.tokenizer.get_vocab()))

    @property
    def context(self) -> int:
        return self.runtime.context

    def encode(self, text: str) -> list[int]:
        self._check(text)
        return encode(self.tokenizer, text, chat=False)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of ``{"role", "content"}`` messages in the model's chat template, up to where its answer begins."""
        if not self.tokenizer.chat_template:
            raise UserError("messages: this model has no chat template")
        self._check("".join(message["content"] for message in messages))
        try:
            return self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True,
                                                      return_dict=True)["input_ids"]
        except jinja2.TemplateError as error:  # a template refuses roles, or their order, that it does not know
            raise UserError(f"messages: the model's chat template refuses them: {error}") from None

    def _check(self, text: str) -> None:
        """Refuse a text that has no tokens, or cannot fit, before much time and memory goes into them."""
        check_text(text)
        least = len(text) // self._longest_token
        if least >= self.context:
            raise TooLong(f"prompt: at least {least} tokens, but the model's context is {self.context}")

    def answer(self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling = Sampling(),
               stop: Sequence[str] = ()) -> "Answer":
        """The text that follows ``prompt``, of at most ``max_new_tokens`` tokens and as the context leaves room for."""
        if len(prompt) >= self.context:
            raise UserError(f"prompt: {len(prompt)} tokens, but the model's context is {self.context}")
        return Answer(self, prompt, min(max_new_tokens, self.context - len(prompt)), sampling, stop)


class Answer:
    """The pieces of one text, to be iterated once; a piece a token, empty while a character or a possible stop string
    is unfinished.

    ``new_tokens`` counts as it goes; ``finish_reason`` at the end is ``"stop"`` (the model's own end, or a string of
    ``stop``, which is left out of the text) or ``"length"``.
    """

    def __init__(self, model: LanguageModel, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling,
                 stop: Sequence[str]):
        self._model, self._prompt, self._limit = model, prompt, max_new_tokens
        self._sampling, self._stop = sampling, stop
        self.prompt_tokens, self.new_tokens = len(prompt), 0
        self.finish_reason = "length"

    def __iter__(self) -> Iterator[str]:
        text = TextStream(self._model.tokenizer, self._prompt)
        held = StopStrings(self._stop)
        with closing(self._model.runtime.stream(self._prompt, self._limit, self._sampling)) as tokens:
            for token in tokens:
                self.new_tokens += 1
                yield held.push(text.push(token))
                if held.found:
                    self.finish_reason = "stop"
                    return
        yield held.push(text.flush()) + held.flush()
        if held.found or self.new_tokens < self._limit:
            self.finish_reason = "stop"


class StopStrings:
    """Lets text through up to the first of some strings, and holds back what may become the beginning of one."""

    def __init__(self, strings: Sequence[str]):
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain to lie before any stop string, now that ``text`` has come."""
        if self.found:
            return ""
        self._held += text
        places = [place for string in self._strings if (place := self._held.find(string)) >= 0]
        if places:
            self.found = True
            certain, self._held = self._held[:min(places)], ""
            return certain
        kept = max((n for string in self._strings for n in range(1, len(string)) if self._held.endswith(string[:n])),
                   default=0)
        cut = len(self._held) - kept
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def flush(self) -> str:
        """What was held back when the text ended without a stop string."""
        rest, self._held = self._held, ""
        return rest
