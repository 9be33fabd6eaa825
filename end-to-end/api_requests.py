"""The bodies of the OpenAI routes that serve.py understands, and what it refuses because it would answer wrongly."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Fields that change the answer in ways this server cannot, with the values that leave it alone.
_NEUTRAL = {"n": (None, 1), "best_of": (None, 1), "echo": (None, False), "suffix": (None, ""),
            "logprobs": (None, False), "top_logprobs": (None, 0), "logit_bias": (None, {}),
            "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "tools": (None, []), "functions": (None, []),
            "tool_choice": (None, "auto", "none"), "function_call": (None, "auto", "none"),
            "min_p": (None, 0), "repetition_penalty": (None, 1), "min_tokens": (None, 0), "ignore_eos": (None, False),
            "stop_token_ids": (None, []),
            "response_format": (None, {"type": "text"}), "modalities": (None, ["text"]), "audio": (None,)}

StopString = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class Body(BaseModel):
    """What both routes share. Fields not named here are ignored if they do not change the answer."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**63)  # not OpenAI's, but common
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_can_be_done(cls, content: Any) -> Any:
        for name, neutral in _NEUTRAL.items():
            if isinstance(content, dict) and content.get(name) not in neutral:
                raise ValueError(f"{name}: expected {neutral[-1]!r}, which is all this server can do, "
                                 f"got {str(content[name])[:60]!r}")
        return content

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Body):
    """``/v1/completions``: one prompt, as text or as token ids."""

    prompt: str | Annotated[list[int], Field(min_length=1)]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        """A list of one prompt is that prompt."""
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            return prompt[0]
        if isinstance(prompt, list) and prompt and not all(isinstance(part, int) for part in prompt):
            raise ValueError(f"expected one prompt a request, got {len(prompt)}")
        return prompt


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn; a list of text parts is their concatenation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """The form that chat templates take; they know a developer's words as the system's."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Body):
    """``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
