"""How the OpenAI routes write answers and errors."""

import json
import time
import uuid

from answering import Answer


class ApiError(Exception):
    """An error in the API's own form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def content(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def event(content: dict) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(content)}\n\n"


LAST_EVENT = "data: [DONE]\n\n"


def usage(answer: Answer) -> dict:
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.new_tokens,
            "total_tokens": answer.prompt_tokens + answer.new_tokens}


class Form:
    """The two routes' ways: chats are messages and deltas, completions are text."""

    def __init__(self, prefix: str, model: str, chat: bool):
        self.chat = chat
        self._id, self._model, self._created = f"{prefix}-{uuid.uuid4().hex}", model, int(time.time())

    def shell(self, chunk: bool) -> dict:
        kind = f"chat.completion{'.chunk' if chunk else ''}" if self.chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def whole(self, text: str, finish_reason: str) -> dict:
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self.shell(chunk=False) | {"choices": [self._choice(content, finish_reason)]}

    def chunk(self, content: dict, finish_reason: str | None = None) -> dict:
        content = {"delta": content} if self.chat else content
        return self.shell(chunk=True) | {"choices": [self._choice(content, finish_reason)]}

    def piece(self, text: str) -> dict:
        return self.chunk({"content": text} if self.chat else {"text": text})

    def end(self, finish_reason: str) -> dict:
        return self.chunk({} if self.chat else {"text": ""}, finish_reason)

    @staticmethod
    def _choice(content: dict, finish_reason: str | None) -> dict:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
