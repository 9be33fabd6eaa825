"""Tokens to text as they come: what is printed is whole characters, and all of it together is the decoded whole."""

from collections.abc import Sequence

REPLACEMENT = "\ufffd"  # what a tokenizer decodes an unfinished character to


class TextStream:
    """Text of a growing list of tokens. ``prompt`` is context only: some tokenizers drop a space at the very start."""

    def __init__(self, tokenizer, prompt: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.tokens = list(prompt)
        # Text of tokens[context:shown] is out already; decoding starts at context, so that cost stays bounded.
        self.context = max(0, len(self.tokens) - 8)
        self.shown = len(self.tokens)

    def _decode(self, end: int | None = None) -> str:
        return self.tokenizer.decode(self.tokens[self.context:end], skip_special_tokens=True,
                                     clean_up_tokenization_spaces=False)

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is unfinished."""
        self.tokens.append(token)
        return "" if self._decode().endswith(REPLACEMENT) else self.flush()

    def flush(self) -> str:
        """All text not yet given out, unfinished or not."""
        new = self._decode()[len(self._decode(self.shown)):]
        if self.shown < len(self.tokens):
            self.context, self.shown = self.shown, len(self.tokens)
        return new
