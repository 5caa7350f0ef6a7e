"""POST /v1/chat/completions: a question about a picture or clip, answered at once or as it comes."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from lance_quant.errors import InputError
from lance_quant.inference.pipeline import OnStep, Pipeline
from lance_quant.serving import inputs
from lance_quant.serving.openai_schemas import ChatRequest, Part
from lance_quant.serving.service import LEFT, ApiError, Service


@dataclass(frozen=True)
class Question:
    """What a conversation asks: its last visual, its last question, its system prompt; how much was left out."""

    kind: str
    content: bytes
    text: str
    system: str | None
    left_out: int


def question_of(request: ChatRequest) -> Question:
    """The last question about the last visual: Lance answers one at a time.

    Raises:
        InputError: no visual, several in one message, or no text.
    """
    system, visual, text, used = None, None, "", 0
    for index, message in enumerate(request.messages):
        parts = [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content or []
        words = "\n".join(part.text for part in parts if part.text)
        if message.role in ("system", "developer"):
            system = words
        elif message.role == "user":
            shown = [part for part in parts if part.image_url is not None or part.video_url is not None]
            if len(shown) > 1:
                raise InputError(f"messages.{index} shows {len(shown)} pictures or clips, and Lance looks at one per "
                                 "question")
            visual, text, used = shown[0] if shown else visual, words, used + 1
    if visual is None:
        raise InputError("no message shows a picture or clip, and Lance answers questions about one: add a part "
                         '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}')
    kind = "image" if visual.image_url is not None else "video"
    found = visual.image_url if kind == "image" else visual.video_url
    url = found if isinstance(found, str) else found.url if found is not None else ""
    return Question(kind, inputs.bytes_of(url, f"the {kind}'s url"), text, system, used - 1)


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    answer: int = 0

    def as_json(self) -> dict[str, int]:
        """The usage object."""
        return {"prompt_tokens": self.prompt, "completion_tokens": self.answer,
                "total_tokens": self.prompt + self.answer}


def _asking(asked: Question, request: ChatRequest, service: Service, model: str, usage: Usage,
            on_text: Callable[[str], None] | None) -> Callable[[Pipeline, OnStep], str]:
    """The work of a chat request."""
    options: dict[str, Any] = {
        "resolution": service.preset(model, request.resolution), "max_new_tokens": request.most_tokens,
        "temperature": request.temperature or 0.0, "top_p": request.top_p or 1.0, "seed": request.seed}
    if asked.system is not None:
        options["system"] = asked.system

    def work(pipeline: Pipeline, on_step: OnStep) -> str:
        def counted(progress: Any) -> None:
            usage.answer = progress.done
            on_step(progress)

        if asked.kind == "image":
            shown = inputs.picture(asked.content, service.limits, "the image")
            text = pipeline.ask(shown, asked.text, on_step=counted, on_text=on_text, **options)
        else:
            with inputs.clip(asked.content, service.limits, "the video") as path:
                text = pipeline.ask_video(path, asked.text, on_step=counted, on_text=on_text, **options)
        usage.prompt = pipeline.prompt_tokens
        return text

    return work


def add_chat(app: FastAPI, service: Service) -> None:
    """Add the route to an application."""

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Any:
        model = service.model(body.model)
        if body.most_tokens > service.limits.tokens:
            raise ApiError(400, f"max_tokens {body.most_tokens} is above {service.limits.tokens}, this server's limit",
                           param="max_tokens")
        asked = question_of(body)
        reply = _Reply(model, body, Usage(), asked.left_out)
        if body.stream:
            return await _stream(request, service, reply, asked)
        job = service.submit(model, _asking(asked, body, service, model, reply.usage, None))
        text = await service.result(request, job)
        return reply.whole(text)


class _Reply:
    """The objects of one chat completion."""

    def __init__(self, model: str, body: ChatRequest, usage: Usage, left_out: int):
        self.model, self.body, self.usage, self._left_out = model, body, usage, left_out
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def reason(self) -> str:
        """Why the answer ended."""
        return "length" if self.usage.answer >= self.body.most_tokens else "stop"

    def whole(self, text: str) -> dict[str, Any]:
        """The completion; earlier questions that were not answered again are counted, since Lance takes one."""
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": self.reason()}
        more = {"lance": {"earlier_questions_left_out": self._left_out}} if self._left_out else {}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self.usage.as_json(), **more}

    def chunk(self, delta: dict[str, str], reason: str | None = None) -> str:
        """One event of a stream."""
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return self.event({**self._head, "object": "chat.completion.chunk", "choices": [choice]})

    def last(self) -> str:
        """The event with the usage."""
        return self.event({**self._head, "object": "chat.completion.chunk", "choices": [],
                           "usage": self.usage.as_json()})

    @staticmethod
    def event(value: object) -> str:
        """A server-sent event."""
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _stream(request: Request, service: Service, reply: _Reply, asked: Question) -> StreamingResponse:
    """Text as it comes. Errors before the first token are answered as such; later ones end the stream with an event."""
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

    def on_text(text: str) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, text)

    job = service.submit(reply.model, _asking(asked, reply.body, service, reply.model, reply.usage, on_text))
    job.future.add_done_callback(lambda _: loop.call_soon_threadsafe(pieces.put_nowait, None))
    while True:
        with contextlib.suppress(asyncio.TimeoutError):
            first = await asyncio.wait_for(pieces.get(), LEFT)
            break
        if await request.is_disconnected():
            service.engine.cancel(job)
            raise ApiError(499, "the client left")
    if first is None:
        job.future.result()  # raises what went wrong; an empty answer goes on

    async def events() -> AsyncIterator[str]:
        piece = first
        try:
            yield reply.chunk({"role": "assistant", "content": ""})
            while piece is not None:
                yield reply.chunk({"content": piece})
                piece = await pieces.get()
            error = job.future.exception()
            if error is not None:
                yield reply.event({"error": {"message": str(error), "type": "server_error", "param": None,
                                             "code": None}})
                return
            yield reply.chunk({}, reply.reason())
            if reply.body.stream_options.include_usage:
                yield reply.last()
            yield "data: [DONE]\n\n"
        finally:
            service.engine.cancel(job)  # of no effect on one that is done

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
