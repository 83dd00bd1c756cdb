"""The application: OpenAI's endpoints for bundles that write, hear or search, and one each for the other tasks."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from qft.bundle.feed import AT_ONCE
from qft.bundle.manifest import Bundle
from qft.bundle.predict import predictions
from qft.errors import InputError, QftError
from qft.serve.errors import ApiError, api_error
from qft.serve.forms import ChatAsked, CompletionAsked, QuestionAsked, TextsAsked
from qft.serve.guard import Guard
from qft.serve.metrics import Metrics
from qft.serve.shapes import Shape, event, usage
from qft.serve.speech import heard, sound_of
from qft.serve.streams import EventStream, collected, until_gone
from qft.serve.turns import Full, Stopped, Turns
from qft.serve.vectors import EmbeddingsAsked, body, embedded
from qft.serve.writer import Begun, Done, Piece, Writer

_ENDPOINTS = {
    "text-generation": ["/v1/chat/completions", "/v1/completions"],
    "text-classification": ["/classify"],
    "question-answering": ["/answer"],
    "automatic-speech-recognition": ["/v1/audio/transcriptions"],
    "translation": ["/translate"],
    "sentence-similarity": ["/v1/embeddings"],
}
_ALWAYS = ["/", "/health", "/metrics", "/v1/models"]
_PAGE = Path(__file__).with_name("page.html")
_PAGE_RULES = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


class Service:
    """A bundle with its session, asked by one thread. Raises InputError as `open_session` does, or for another task."""

    def __init__(self, bundle: Bundle, *, waiting: int, most_tokens: int) -> None:
        self.name, self.task = bundle.manifest["name"], bundle.manifest["task"]
        if self.task not in _ENDPOINTS:
            raise InputError(f"a bundle for {self.task} cannot be served", hint="ask it with `qft predict`")
        self.endpoints = [*_ENDPOINTS[self.task], *(["/classify"] if bundle.known_labels else [])]
        self.bundle, self.runner = bundle, bundle.runner()
        self.turns = Turns(at_once=AT_ONCE, waiting=waiting)
        self.metrics = Metrics(self.turns)
        self.most_tokens = most_tokens

    def fits(self, path: str, model: str | None) -> None:
        """Raises ApiError if this bundle's task is another, or another model is asked for."""
        if path not in self.endpoints:
            raise ApiError(404, f"this bundle is for {self.task}: ask POST {' or '.join(self.endpoints)}")
        if model not in (None, self.name):
            raise ApiError(404, f"no model {model!r} here, but {self.name!r}", param="model", code="model_not_found")

    @property
    def card(self) -> dict[str, Any]:
        """As /v1/models lists it."""
        created = int((self.bundle.folder / "qft.json").stat().st_mtime)
        about = {"task": self.task, "target": self.bundle.manifest["target"], "endpoints": self.endpoints}
        return {"id": self.name, "object": "model", "created": created, "owned_by": "qft", **about}


def make_app(service: Service, *, key: str | None) -> Any:
    """The ASGI application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # their pages would be fetched from elsewhere
    _about(app, service)
    _text(app, service)
    _tasks(app, service)
    _errors(app)
    paths = {path for found in _ENDPOINTS.values() for path in found}
    return Guard(app, key=key, metrics=service.metrics, paths=frozenset([*paths, *_ALWAYS]))


def _about(app: FastAPI, service: Service) -> None:
    @app.get("/")
    async def page() -> Response:
        return FileResponse(_PAGE, headers={"Content-Security-Policy": _PAGE_RULES})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "working": service.turns.working, "waiting": service.turns.waiting}

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.fits(service.endpoints[0], name)
        return service.card


def _text(app: FastAPI, service: Service) -> None:
    writer = Writer(
        service.bundle, service.runner, at_once=AT_ONCE, most_tokens=service.most_tokens, metrics=service.metrics
    )

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatAsked, request: Request) -> Response:
        service.fits("/v1/chat/completions", asked.model)
        return await _written(service, request, writer.chat(asked), asked, Shape(service.name, chat=True))

    @app.post("/v1/completions")
    async def complete(asked: CompletionAsked, request: Request) -> Response:
        service.fits("/v1/completions", asked.model)
        return await _written(service, request, writer.complete(asked), asked, Shape(service.name, chat=False))


async def _written(service: Service, request: Request, steps: Iterator[Any], asked: Any, shape: Shape) -> Response:
    ticket = service.turns.take(steps)
    if not asked.stream:
        begun, *said, done = await collected(request, ticket)
        text = "".join(piece.text for piece in said)
        return JSONResponse(shape.whole(text, done.reason, done.calls, usage(begun.prompt_tokens, done.tokens)))
    events = ticket.events()
    async with until_gone(request, ticket):
        begun = await anext(events)  # what is wrong with the question is told with a status of its own
    return EventStream(_streamed(begun, events, shape, usage_wanted=asked.usage_wanted), ticket)


async def _streamed(
    begun: Begun, events: AsyncIterator[Any], shape: Shape, *, usage_wanted: bool
) -> AsyncIterator[str]:
    yield shape.first()
    try:
        async for one in events:
            if isinstance(one, Piece) and one.text:
                yield shape.piece(one.text)
            if isinstance(one, Done):
                yield shape.last(one.reason, one.calls)
                if usage_wanted:
                    yield shape.used(usage(begun.prompt_tokens, one.tokens))
    except Exception as error:
        if api_error(error).status == 500:
            logging.getLogger("uvicorn.error").error("a request failed", exc_info=error)
        yield event(api_error(error).body)
        return
    yield event("[DONE]")


def _tasks(app: FastAPI, service: Service) -> None:
    bundle, runner = service.bundle, service.runner

    async def each(request: Request, answers: Iterator[Any]) -> dict[str, Any]:
        found = await collected(request, service.turns.take(answers))
        data = [{"index": number, **asdict(one)} for number, one in enumerate(found)]
        return {"object": "list", "model": service.name, "data": data}

    @app.post("/classify")
    async def classify(asked: TextsAsked, request: Request) -> dict[str, Any]:
        service.fits("/classify", asked.model)
        return await each(
            request, (next(predictions(bundle, [text], runner, max_new_tokens=0)) for text in asked.texts)
        )

    @app.post("/translate")
    async def translate(asked: TextsAsked, request: Request) -> dict[str, Any]:
        service.fits("/translate", asked.model)
        most = min(asked.max_tokens, service.most_tokens)
        return await each(request, (bundle.translate([text], runner, max_new_tokens=most)[0] for text in asked.texts))

    @app.post("/answer")
    async def answer(asked: QuestionAsked, request: Request) -> dict[str, Any]:
        service.fits("/answer", asked.model)
        steps = (bundle.find(asked.question, asked.context, runner) for _ in range(1))
        return {"model": service.name, **asdict((await collected(request, service.turns.take(steps)))[0])}

    @app.post("/v1/embeddings")
    async def embed(asked: EmbeddingsAsked, request: Request) -> dict[str, Any]:
        service.fits("/v1/embeddings", asked.model)
        parts = await collected(request, service.turns.take(embedded(asked, bundle, runner)))
        return body([one for part in parts for one in part], service.name, asked.encoding_format)

    @app.post("/v1/audio/transcriptions")
    async def transcribe(request: Request) -> Response:
        service.fits("/v1/audio/transcriptions", None)
        sound = await sound_of(request)
        service.fits("/v1/audio/transcriptions", sound.model)
        parts = await collected(request, service.turns.take(heard(sound, bundle, runner)))
        text = " ".join(part.text for part in parts)
        return PlainTextResponse(text) if sound.plain else JSONResponse({"text": text})


def _errors(app: FastAPI) -> None:
    async def told(_: Request, error: Exception) -> Response:
        return api_error(error).response  # a defect of ours is raised on, and uvicorn logs it

    async def malformed(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        if first["type"] in ("json_invalid", "model_attributes_type"):
            return ApiError(400, "the body must be a JSON object, sent as application/json").response
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = ": ".join(filter(None, [where, first["msg"].removeprefix("Value error, ")]))
        return ApiError(400, message, param=where or None).response

    async def elsewhere(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, ApiError):  # a body that became too long while FastAPI read it
            return error.__cause__.response
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response

    handlers: dict[Any, Callable[..., Any]] = {RequestValidationError: malformed, HTTPException: elsewhere}
    for kind in (ApiError, QftError, Full, Stopped, Exception):
        handlers[kind] = told
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
