"""Which clients of the page still wait for an answer: what nobody waits for any more is not
computed.

Gradio gives up what a client had asked for when its connection is seen to be closed, but not what a
client asked for that never listened, or is gone for only a few seconds.
"""

import asyncio
import json
import time
from collections import Counter
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs


PATIENCE = 3.0  # seconds that a client has to begin to listen
RETURN = 1.0  # seconds that one has to come back, which a browser does between two answers
_KEPT = 1000  # clients that have left, of which it is known when
_CALL = "hf_intervene.call"  # in the scope of a request: what is known of it


class Clients:
    """The connections over which clients wait for answers, by session, or by event for calls
    without one. A factory of the middleware (ASGI) that sees all requests."""

    def __init__(self) -> None:
        self._waiting: Counter[str] = Counter()
        self._left_at: dict[str, float] = {}  # in this order

    def left(self, request: Any) -> bool:
        """Whether nobody waits any more for the answer of a `gradio.Request`."""
        scope = getattr(getattr(request, "request", None), "scope", None) or {}
        call = scope.get(_CALL)
        if call is None:
            return False
        key = request.session_hash or call.get("event")
        if not key or self._waiting[key]:
            return False
        came, left_at = call["came"], self._left_at.get(key, 0.0)
        return time.monotonic() > (left_at + RETURN if left_at > came else came + PATIENCE)

    def middleware(self, app: Any) -> Any:
        """The application, watched."""

        async def watched(scope: dict, receive: Any, send: Any) -> None:
            words = scope.get("path", "").strip("/").split("/")
            if scope["type"] != "http":
                await app(scope, receive, send)
            elif scope["method"] == "POST" and ("call" in words or words[-2:] == ["queue", "join"]):
                scope[_CALL] = {"came": time.monotonic()}
                await app(scope, receive, _noting_event(send, scope[_CALL]))
            elif scope["method"] == "GET" and words[-2:] == ["queue", "data"]:
                query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
                await self._listening(app, scope, receive, send, query.get("session_hash", [""])[0])
            elif scope["method"] == "GET" and "call" in words:
                await self._listening(app, scope, receive, send, words[-1])
            else:
                await app(scope, receive, send)

        return watched

    async def _listening(self, app: Any, scope: dict, receive: Any, send: Any, key: str) -> None:
        self._waiting[key] += 1
        waits = True

        def leave() -> None:
            nonlocal waits
            if waits:
                waits = False
                self._waiting[key] -= 1
                self._left_at.pop(key, None)
                self._left_at[key] = time.monotonic()
                if len(self._left_at) > _KEPT:
                    del self._left_at[next(iter(self._left_at))]

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            leave()

        watcher = asyncio.ensure_future(watch())
        try:
            await app(scope, receive, send)
        finally:
            leave()
            watcher.cancel()
            if not self._waiting[key]:
                del self._waiting[key]


def _noting_event(send: Any, call: dict) -> Any:
    """What sends a response, and keeps the number of the event that it names."""
    body = b""

    async def noting(message: dict) -> None:
        nonlocal body
        if message["type"] == "http.response.body" and len(body) < 10_000:
            body += message.get("body", b"")
            if not message.get("more_body"):
                with suppress(ValueError, TypeError, AttributeError):
                    call["event"] = json.loads(body).get("event_id")
        await send(message)

    return noting
