"""The routes: OpenAI's completions and chat completions over one `Worker`, and what operators read.

Everything that a client may do wrong ends here as an `ApiError`, before the first token; after it a
stream can only say so in an event of its own.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

import llama2rt
from llama2rt.errors import InputError
from llama2rt.generate import Engine
from llama2rt.serve import page, weights
from llama2rt.serve.answers import Choice, Pieces, Shape, event
from llama2rt.serve.errors import ApiError, of_validation
from llama2rt.serve.limits import Guard
from llama2rt.serve.metrics import Metrics
from llama2rt.serve.options import Limits
from llama2rt.serve.protocol import ChatRequest, CompletionRequest, WeightsRequest
from llama2rt.serve.protocol import Request as Asked
from llama2rt.serve.worker import Answers, EngineStopped, Worker
from llama2rt.text import chat

_DROPPED = 499  # nginx's status for a client that left; nobody reads it


@dataclass
class Server:
    """What the routes share."""

    worker: Worker
    name: str
    limits: Limits
    metrics: Metrics = field(default_factory=Metrics)
    weights_from: Path | None = None
    """folder below which clients may name weights to be read; None for nowhere"""
    draining: bool = False
    """whether the process is about to end: no new requests"""

    def __post_init__(self) -> None:
        self.engine: Engine = self.worker.engine
        self.pieces = Pieces(self.engine.tokenizer)
        self.created = int(time.time())

    async def complete(self, asked: CompletionRequest, http: Request) -> Response:
        """Answer a `/v1/completions`."""
        tokenizer = self.engine.tokenizer

        def encode() -> list[list[int]]:
            return [
                tokenizer.encode(one, bos=True) if isinstance(one, str) else one
                for one in asked.prompt
            ]

        self._admit(asked, len(asked.prompt) * asked.n)
        prompts = await _encoded(encode, "prompt")
        logprobs = asked.logprobs is not None
        task = _Task(self, asked, http, prompts, prompts)
        shape = self._shape("completion", asked, prompts, logprobs)
        return await task.answer(shape, asked.max_tokens, asked.logprobs or 0)

    async def chat(self, asked: ChatRequest, http: Request) -> Response:
        """Answer a `/v1/chat/completions`."""
        self._admit(asked, asked.n)
        messages, tokenizer = asked.messages, self.engine.tokenizer
        prompts = await _encoded(lambda: [chat.encode_prompt(tokenizer, messages)], "messages")
        task = _Task(self, asked, http, prompts, [messages])
        most = asked.most_tokens or self.limits.max_tokens or self.engine.model.config.context
        shape = self._shape("chat", asked, prompts, asked.logprobs)
        return await task.answer(shape, most, asked.top_logprobs)

    def _admit(self, asked: Asked, choices: int) -> None:
        """ApiError where the request asks for another model or for too much, or comes too late."""
        for name in asked.without_effect:
            self.metrics.count("fields_without_effect", field=name)
        if asked.model not in (None, self.name):
            raise ApiError(
                404,
                f"model: this server has {self.name!r}, not {asked.model!r}",
                param="model",
                code="model_not_found",
            )
        if choices > self.limits.max_choices:
            raise ApiError(
                400,
                f"n: expected at most {self.limits.max_choices} answers in all, got {choices}",
                param="n",
            )
        most = self.limits.max_tokens
        given = getattr(asked, "max_tokens", None) or getattr(asked, "max_completion_tokens", None)
        if most is not None and given is not None and given > most:
            raise ApiError(
                400, f"max_tokens: expected at most {most}, got {given}", param="max_tokens"
            )
        if self.worker.failure is not None:
            raise ApiError(503, f"the engine has stopped: {self.worker.failure}")
        if self.draining:
            raise ApiError(503, "the server is shutting down", retry_after_s=10)
        if self.worker.open + choices > self.engine.max_sequences + self.limits.queue:
            raise ApiError(
                429,
                f"{self.worker.open} answers are under way or wait; try again later",
                code="queue_full",
                retry_after_s=min(60.0, self.metrics.histograms["request_seconds"].mean()),
            )

    def _shape(
        self, kind: str, asked: Asked, prompts: Sequence[Sequence[int]], logprobs: bool
    ) -> Shape:
        return Shape(
            kind,
            self.name,
            self.pieces,
            prompts,
            n=asked.n,
            logprobs=logprobs,
            token_ids=asked.return_token_ids,
            include_usage=asked.include_usage,
        )

    async def update(self, asked: WeightsRequest) -> dict[str, Any]:
        """Read other weights of the same model. What is under way goes on with them."""
        if self.weights_from is None:
            raise ApiError(403, "weights: the server was started without --weights-from")
        folder = Path(asked.model_path).resolve()
        if not folder.is_relative_to(self.weights_from.resolve()):
            raise ApiError(403, f"model_path: expected a folder in {self.weights_from}")
        try:
            read = await asyncio.to_thread(weights.read, folder, self.engine)
        except InputError as error:
            raise ApiError(400, str(error), param="model_path") from None
        await self.worker.call(lambda: weights.assign(self.engine.model, read))
        return {"success": True, "message": f"weights of {folder}"}

    def models(self) -> dict[str, Any]:
        model = {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "llama2rt",
            "max_model_len": self.engine.model.config.context,
        }
        return {"object": "list", "data": [model]}

    def health(self) -> JSONResponse:
        if self.worker.failure is not None:
            return JSONResponse({"status": "failed", "reason": str(self.worker.failure)}, 503)
        if self.draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    def metrics_text(self) -> str:
        now = self.worker.statistics
        return self.metrics.text(
            {
                "running": ("Sequences that decode together", now.running),
                "waiting": (
                    "Sequences that wait for their turn",
                    max(0, self.worker.open - now.running),
                ),
                "pages": ("Pages of the cache of keys and values", now.pages),
                "pages_used": ("Pages that sequences hold", now.pages_used),
                "pages_cached": ("Pages kept for prompts that begin alike", now.pages_cached),
                "prefix_hit_tokens": ("Prompt tokens found in pages", now.prefix_hits),
                "computed_prompt_tokens": ("Prompt tokens computed", now.prompt_tokens),
                "preemptions": ("Times that a sequence gave up its pages", now.preemptions),
            }
        )


@dataclass
class _Task:
    """One request on its way through the engine."""

    server: Server
    asked: Asked
    http: Request
    prompts: Sequence[Sequence[int]]
    given: Sequence[Any]
    """what the session takes for each prompt: ids, or messages"""

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        self.last: dict[int, float] = {}
        self.tokens = 0

    async def answer(self, shape: Shape, max_tokens: int, top: int) -> Response:
        """The whole answer, or a stream of it."""
        server, asked = self.server, self.asked
        deadline = asyncio.get_running_loop().time() + server.limits.request_seconds
        try:
            options = asked.options(max_tokens, top)
            answers = await server.worker.add(self.given, options, asked.n)
        except InputError as error:
            raise _refused(error) from None
        server.metrics.count("prompt_tokens", sum(map(len, self.prompts)))
        if asked.stream:
            body = self._events(answers, shape, deadline)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(body, media_type="text/event-stream", headers=headers)
        return await self._whole(answers, shape, deadline)

    async def _whole(self, answers: Answers, shape: Shape, deadline: float) -> Response:
        choices = [Choice() for _ in range(answers.open)]

        async def gather() -> None:
            async for index, update in answers.updates():
                self._measure(index, len(update.tokens))
                choices[index].add(update)

        work = asyncio.ensure_future(gather())
        gone = asyncio.ensure_future(_until_gone(self.http.receive))
        left = deadline - asyncio.get_running_loop().time()
        try:
            await asyncio.wait({work, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
                return JSONResponse(shape.whole(choices))
            if gone.done():
                self.server.metrics.count("dropped")
                return Response(status_code=_DROPPED)
            raise self._late()
        finally:
            work.cancel()
            gone.cancel()
            answers.close()
            self._finish()

    async def _events(
        self, answers: Answers, shape: Shape, deadline: float
    ) -> AsyncIterator[bytes]:
        complete = False
        try:
            async with asyncio.timeout_at(deadline):
                async for index, update in answers.updates():
                    self._measure(index, len(update.tokens))
                    if update.text or update.tokens or update.finish_reason:
                        yield event(shape.chunk(index, update))
            if shape.include_usage:
                yield event(shape.last_chunk(self.tokens))
            complete = True
            yield event("[DONE]")
        except TimeoutError:
            complete = True
            yield event(self._late().body())
        except EngineStopped as error:
            complete = True
            yield event(ApiError(500, str(error)).body())
        finally:
            if not complete:
                self.server.metrics.count("dropped")
            answers.close()
            self._finish()

    def _measure(self, index: int, tokens: int) -> None:
        if not tokens:
            return
        now, metrics = time.perf_counter(), self.server.metrics
        if not self.last:
            metrics.observe("time_to_first_token_seconds", now - self.started)
        if index in self.last:
            metrics.observe("time_per_token_seconds", (now - self.last[index]) / tokens, tokens)
        self.last[index] = now
        self.tokens += tokens
        metrics.count("generated_tokens", tokens)

    def _late(self) -> ApiError:
        most = self.server.limits.request_seconds
        return ApiError(504, f"no answer within {most} s", code="timeout")

    def _finish(self) -> None:
        self.server.metrics.observe("request_seconds", time.perf_counter() - self.started)


async def _encoded(encode: Callable[[], list[list[int]]], field: str) -> list[list[int]]:
    """Token ids of a request's prompts; off the event loop, which a long text would hold up."""
    try:
        return await asyncio.to_thread(encode)
    except InputError as error:
        raise ApiError(400, f"{field}: {error}", param=field) from None


def _refused(error: InputError) -> ApiError:
    message = str(error)
    code = "context_length_exceeded" if "context" in message else None
    return ApiError(400, message, code=code)


async def _until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def build(server: Server, *, api_key: str | None = None) -> FastAPI:
    """The application. Its lifespan starts the worker and ends it."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.worker.start()
        yield
        await server.worker.stop()

    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(
        title="llama2rt",
        version=llama2rt.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    _add_routes(app, server)
    page.add_routes(
        app, server.name, server.engine.model.config.context, needs_key=api_key is not None
    )
    _add_errors(app)
    app.add_middleware(Guard, limits=server.limits, api_key=api_key, metrics=server.metrics)
    return app


def _add_routes(app: FastAPI, server: Server) -> None:
    @app.post("/v1/completions", response_model=None)
    async def completions(asked: CompletionRequest, http: Request) -> Response:
        return await server.complete(asked, http)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(asked: ChatRequest, http: Request) -> Response:
        return await server.chat(asked, http)

    @app.post("/update_weights_from_disk")
    async def update(asked: WeightsRequest) -> dict[str, Any]:
        return await server.update(asked)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return server.models()

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> dict[str, Any]:
        if name != server.name:
            raise ApiError(404, f"model: this server has {server.name!r}", code="model_not_found")
        found: dict[str, Any] = server.models()["data"][0]
        return found

    @app.get("/health", response_model=None)
    async def health() -> Response:
        return server.health()

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return PlainTextResponse(
            server.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(EngineStopped)
    async def stopped(_: Request, error: EngineStopped) -> Response:
        return ApiError(503, str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return of_validation(error.errors()[0]).response()

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail)).response()

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> Response:
        return ApiError(500, f"{type(error).__name__}: {error}").response()
