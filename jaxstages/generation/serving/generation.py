"""One request under way: its answers in the scheduler, and the response, whole or as server-sent events."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest

from jaxstages.generation.serving.choices import CALL_BEGIN, Choice, Piece, chat_logprobs, completion_logprobs
from jaxstages.generation.serving.engine import Answer, NewToken
from jaxstages.generation.serving.metrics import ServerMetrics
from jaxstages.generation.serving.protocol import ApiError, Request
from jaxstages.generation.serving.scheduler import QueueFull, Scheduler, Stopped

CLIENT_CLOSED = 499
"""Status by which a request is counted whose client went away (nginx's)."""


class Generation:
    """The answers to a request. Made in the event loop; it cancels its answers however it ends."""

    def __init__(self, request: Request, scheduler: Scheduler, metrics: ServerMetrics, seconds: float) -> None:
        """Queue the answers.

        Args:
            seconds: longest time until the end of the last answer.

        Raises:
            ApiError: the queue is full.
        """
        self._request, self._metrics = request, metrics
        self._started = time.monotonic()
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._seconds = seconds
        self._id = f"{'chatcmpl' if request.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._events: asyncio.Queue[tuple[int, list[NewToken], str]] = asyncio.Queue()

        prompts = [prompt for prompt in request.prompts for _ in range(request.n)]
        self._choices = [Choice(request, index, len(prompt)) for index, prompt in enumerate(prompts)]
        self._answers = [self._make_answer(index, prompt) for index, prompt in enumerate(prompts)]
        capacity = scheduler.capacity(request.model.name)
        if len(prompts) > capacity:
            metrics.count_request(request.model.name, 400)
            raise ApiError(
                400, f"the request asks for {len(prompts)} answers; this server takes at most {capacity}", "n"
            )
        try:
            scheduler.submit(request.model.name, self._answers)
        except QueueFull as error:
            metrics.count_request(request.model.name, 429)
            raise ApiError(429, "too many requests wait; try again later", code="queue_full") from error
        except Stopped as error:
            metrics.count_request(request.model.name, 503)
            raise ApiError(503, "the model has stopped after an error; restart the server") from error

    def _make_answer(self, index: int, prompt: list[int]) -> Answer:
        loop, request = asyncio.get_running_loop(), self._request

        def on_tokens(tokens: list[NewToken], reason: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and the client with it
                loop.call_soon_threadsafe(self._events.put_nowait, (index, tokens, reason))

        return Answer(
            prompt, request.sampling, on_tokens, request.seed, choice=index, num_alternatives=request.num_alternatives
        )

    async def _pieces(self) -> AsyncIterator[tuple[Choice, Piece]]:
        """Yield the pieces of all choices until each has ended. Raises ApiError if that takes too long, or fails."""
        status, is_first = CLIENT_CLOSED, True
        try:
            while not all(choice.finish_reason for choice in self._choices):
                async with asyncio.timeout_at(self._deadline):
                    index, tokens, reason = await self._events.get()
                if is_first:
                    self._metrics.observe_first_token(self._request.model.name, time.monotonic() - self._started)
                    is_first = False
                choice = self._choices[index]
                if choice.finish_reason:
                    continue  # tokens after a stop string
                if reason == "error":
                    status = 500
                    raise ApiError(500, "the model failed; the server's log says why")
                piece = choice.feed(tokens, reason)
                if choice.finish_reason:
                    self._answers[index].cancelled = True  # a stop string ends it before the model does
                yield choice, piece
            status = 200
        except TimeoutError as error:
            status = 504
            raise ApiError(504, f"the answer took longer than {self._seconds:g} s", code="timeout") from error
        finally:
            self.cancel()
            self._count(status)

    def cancel(self) -> None:
        """End the answers that have not ended."""
        for answer in self._answers:
            answer.cancelled = True

    def _count(self, status: int) -> None:
        name, usage = self._request.model.name, self._usage()
        self._metrics.count_request(name, status)
        self._metrics.observe_request(name, time.monotonic() - self._started)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        self._metrics.count_tokens(name, usage["prompt_tokens"], cached, usage["completion_tokens"])

    def _usage(self) -> dict[str, Any]:
        prompt = sum(map(len, self._request.prompts))
        generated = sum(len(choice.tokens) for choice in self._choices)
        cached = sum(answer.cached_tokens for answer in self._answers[:: self._request.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    # Whole responses ----------------------------------------------------------------------------------------------

    async def complete(self, http: HttpRequest) -> dict[str, Any]:
        """Return the whole response. Generation ends when the client goes away."""
        finished = asyncio.ensure_future(self._collect())
        gone = asyncio.ensure_future(_disconnected(http))
        try:
            await asyncio.wait({finished, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not finished.done():
                raise ApiError(CLIENT_CLOSED, "the client went away")
            return finished.result()
        finally:
            for task in (finished, gone):
                task.cancel()
            await asyncio.gather(finished, gone, return_exceptions=True)

    async def _collect(self) -> dict[str, Any]:
        async for _ in self._pieces():
            pass
        return self._envelope(is_chunk=False) | {
            "choices": [self._whole(choice) for choice in self._choices],
            "usage": self._usage(),
        }

    def _whole(self, choice: Choice) -> dict[str, Any]:
        request = self._request
        wants_log_probs = request.num_alternatives is not None
        common = {"index": choice.index, "finish_reason": choice.finish_reason}
        if not request.is_chat:
            log_probs = completion_logprobs(request.model, choice.tokens, 0) if wants_log_probs else None
            return {"text": choice.text, **common, "logprobs": log_probs}
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.tool_calls:
            text = choice.text.partition(CALL_BEGIN)[0].strip()
            message |= {"content": text or None, "tool_calls": choice.tool_calls}
        log_probs = chat_logprobs(request.model, choice.tokens) if wants_log_probs else None
        return {"message": message, **common, "logprobs": log_probs}

    def _envelope(self, is_chunk: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self._request.is_chat:
            kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._request.model.name,
            "system_fingerprint": self._request.model.fingerprint,
        }

    # Server-sent events -------------------------------------------------------------------------------------------

    async def events(self) -> AsyncIterator[str]:
        """Yield the response as server-sent events. An error after the beginning is an event too."""
        try:
            if self._request.is_chat:
                for choice in self._choices:
                    yield self._event({"index": choice.index, "delta": {"role": "assistant", "content": ""}})
            async for choice, piece in self._pieces():
                if piece.text or piece.tokens or piece.finish_reason:
                    yield self._event(self._delta(choice, piece))
            if self._request.include_usage:
                yield _to_event(self._envelope(is_chunk=True) | {"choices": [], "usage": self._usage()})
        except ApiError as error:
            yield _to_event(error.to_json())
        yield "data: [DONE]\n\n"

    def _delta(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        request = self._request
        wants_log_probs = request.num_alternatives is not None
        common = {"index": choice.index, "finish_reason": piece.finish_reason or None}
        if not request.is_chat:
            offset = len(choice.text) - len(piece.text)
            log_probs = completion_logprobs(request.model, piece.tokens, offset) if wants_log_probs else None
            return {"text": piece.text, **common, "logprobs": log_probs}
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.finish_reason == "tool_calls":
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(choice.tool_calls)]
        log_probs = chat_logprobs(request.model, piece.tokens) if wants_log_probs else None
        return {"delta": delta, **common, "logprobs": log_probs}

    def _event(self, choice: dict[str, Any]) -> str:
        usage = {"usage": None} if self._request.include_usage else {}
        return _to_event(self._envelope(is_chunk=True) | {"choices": [{"finish_reason": None, **choice}]} | usage)


def _to_event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
