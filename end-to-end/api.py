"""The OpenAI routes over one model: chat completions, completions, models, health."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from answering import LanguageModel, TooLong
from api_answers import LAST_EVENT, ApiError, Form, event, usage
from api_requests import Body, ChatBody, CompletionBody
from decdec.errors import UserError
from engine import Busy, Engine, Job
from sampling import Sampling

COMPLETION_TOKENS = 16  # what OpenAI's /v1/completions takes where a request does not say


def build_app(model: LanguageModel, name: str, queue_limit: int = 64) -> FastAPI:
    """The server's routes over ``model``, which requests call ``name``."""
    app = FastAPI(title="DecDEC", docs_url=None, redoc_url=None)
    engine = Engine(queue_limit)
    # One thread for all prompts: each thread that tokenizes keeps the memory of the longest text it saw.
    tokenizing = ThreadPoolExecutor(1, "tokenizer")
    started = int(time.time())

    @app.exception_handler(ApiError)
    async def _own(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.content, error.status)

    @app.exception_handler(RequestValidationError)
    async def _malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        message = first["msg"].removeprefix("Value error, ")
        return JSONResponse(ApiError(400, f"{place}: {message}" if place else message, place or None).content, 400)

    @app.exception_handler(HTTPException)
    async def _no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).content, error.status_code)

    @app.exception_handler(Exception)
    async def _unforeseen(_: Request, error: Exception) -> Response:
        return JSONResponse(ApiError(500, f"the server failed: {type(error).__name__}").content, 500)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok" if engine.alive else "dead", "waiting": engine.waiting},
                            200 if engine.alive else 503)

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [_described()]}

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> dict:
        _check_name(wanted)
        return _described()

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        _check_name(body.model)
        messages = [message.plain() for message in body.messages]
        prompt = await _encoded(model.encode_chat, messages, "messages")
        limit = body.max_completion_tokens or body.max_tokens or model.context
        return await _respond(request, _submit(body, prompt, limit), body, Form("chatcmpl", name, chat=True))

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        _check_name(body.model)
        prompt = await _encoded(model.encode if isinstance(body.prompt, str) else _ids, body.prompt, "prompt")
        limit = body.max_tokens or COMPLETION_TOKENS
        return await _respond(request, _submit(body, prompt, limit), body, Form("cmpl", name, chat=False))

    def _described() -> dict:
        return {"id": name, "object": "model", "created": started, "owned_by": "decdec"}

    def _check_name(wanted: str) -> None:
        if wanted != name:
            raise ApiError(404, f"model: expected {name!r}, the only one here, got {wanted[:200]!r}", "model",
                           "model_not_found")

    def _ids(ids: list[int]) -> list[int]:
        if not all(0 <= token < len(model.tokenizer) for token in ids):
            raise UserError(f"prompt: expected token ids below {len(model.tokenizer)}")
        return ids

    async def _encoded(encode, content, param: str) -> list[int]:
        try:
            prompt = await asyncio.get_running_loop().run_in_executor(tokenizing, encode, content)
            if len(prompt) >= model.context:
                raise TooLong(f"{param}: {len(prompt)} tokens, but the model's context is {model.context}")
        except UserError as error:
            code = "context_length_exceeded" if isinstance(error, TooLong) else None
            raise ApiError(400, str(error), param, code) from None
        return prompt

    def _submit(body: Body, prompt: list[int], limit: int) -> Job:
        sampling = Sampling(1.0 if body.temperature is None else body.temperature, body.top_k or 0, body.top_p or 1.0,
                            random.getrandbits(63) if body.seed is None else body.seed)
        try:
            return engine.submit(lambda: model.answer(prompt, limit, sampling, body.stop_strings))
        except Busy as busy:
            raise ApiError(429, str(busy), code="rate_limit_exceeded") from None

    return app


async def _respond(request: Request, job: Job, body: Body, form: Form) -> Response:
    """The answer as one JSON body, or as a stream of events; a client that goes away cancels its job."""
    if body.stream:
        return StreamingResponse(_events(request, job, body.include_usage, form), media_type="text/event-stream")
    async with _watched(request, job):
        try:
            text = "".join([piece async for piece in job.pieces()])
        except Exception as error:  # whatever the engine met; it has logged what was not the user's mistake
            raise ApiError(500, f"the answer failed: {error}") from None
    if job.answer is None:  # cancelled before its turn: nobody reads this
        return Response(status_code=499)
    return JSONResponse(form.whole(text, job.answer.finish_reason) | {"usage": usage(job.answer)})


async def _events(request: Request, job: Job, include_usage: bool, form: Form) -> AsyncIterator[str]:
    try:
        async with _watched(request, job):
            if form.chat:
                yield event(form.chunk({"role": "assistant", "content": ""}))
            async for piece in job.pieces():
                yield event(form.piece(piece))
        if job.answer is None:  # cancelled before its turn
            return
        yield event(form.end(job.answer.finish_reason))
        if include_usage:
            yield event(form.shell(chunk=True) | {"choices": [], "usage": usage(job.answer)})
        yield LAST_EVENT
    except Exception as error:  # the status is out already, so the stream itself has to say it
        yield event(ApiError(500, f"the answer failed: {error}").content)
    finally:
        job.cancel()


@asynccontextmanager
async def _watched(request: Request, job: Job) -> AsyncIterator[None]:
    """Cancel ``job`` as soon as the client of ``request`` goes away."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
