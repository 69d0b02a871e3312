"""Who is let in: by name of the host, origin, token and rate; and what every answer says to browsers."""

import collections
import contextlib
import hmac
import time
from http.cookies import SimpleCookie
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from starflow_jax.config import Serve
from starflow_jax.serving.metrics import Metrics
from starflow_jax.settings.fields import names

COOKIE = "starflow_token"
OPEN = ("/healthz",)  # without a token
BEGINNINGS = {("POST", "/v1/videos"), ("WEBSOCKET", "/v1/session")}  # which the rate counts
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
                               "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
                               "frame-ancestors 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin"}


class CutOff(Exception):
    """Raised where the rest of an answer will not come."""


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, settings: Serve, token: str, metrics: Metrics) -> None:
        """token: that clients must show; "": none."""
        self._app, self._settings, self._token, self._metrics = app, settings, token, metrics
        self._rate = Rate(settings.rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if message["status"] >= 400:
                    self._metrics.refused.labels(str(message["status"])).inc()
            with anyio.fail_after(self._settings.idle_seconds):  # who does not read is cut off
                await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            # An answer that is not finished closes the connection.
            with contextlib.suppress(CutOff, TimeoutError, ClientDisconnect):
                await self._app(scope, receive, answer)
        elif scope["type"] == "http":
            await refusal(scope, receive, answer)
        else:
            self._metrics.refused.labels(str(refusal.status_code)).inc()
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: status 403

    def _refusal(self, scope: Scope) -> Response | None:
        headers, method = Headers(scope=scope), scope.get("method", "WEBSOCKET")
        if not self._host_is_ours(headers.get("host", "")):
            return refused(421, "this server has another name; call it by the address that it listens on")
        origin = headers.get("origin")
        if origin is not None and method not in ("GET", "HEAD") and not self._origin_is_ours(origin, headers["host"]):
            return refused(403, "requests from pages of other origins are refused")
        if self._token and scope["path"] not in OPEN:
            shown = QueryParams(scope["query_string"]).get("token", "")
            if shown and method == "GET" and scope["path"] == "/" and self._is_token(shown):
                answer = RedirectResponse("/", 303)
                answer.set_cookie(COOKIE, shown, httponly=True, samesite="strict", secure=scope["scheme"] == "https")
                return answer
            if not self._is_token(_bearer(headers)) and not self._is_token(_cookie(headers)):
                return refused(401, "a token is needed: Authorization: Bearer TOKEN, or /?token=TOKEN in a browser",
                               {"www-authenticate": "Bearer"})
        if (method, scope["path"]) in BEGINNINGS and not self._rate.allows((scope.get("client") or ("",))[0]):
            return refused(429, f"more than {self._settings.rate} in a minute; wait", {"retry-after": "10"})
        return None

    def _is_token(self, shown: str) -> bool:
        return hmac.compare_digest(shown.encode(errors="replace"), self._token.encode())

    def _host_is_ours(self, host: str) -> bool:
        """On this machine alone, other names than its own are those of pages that pretend to be it."""
        if not self._settings.local or self._token:
            return True
        known = {"localhost", "127.0.0.1", "::1", self._settings.host, *map(_host, self._origins)}
        return _host(f"//{host}") in known

    def _origin_is_ours(self, origin: str, host: str) -> bool:
        return origin in self._origins or urlsplit(origin).netloc == host

    @property
    def _origins(self) -> tuple[str, ...]:
        return names(self._settings.origins) if self._settings.origins else ()


class Rate:
    """So many in a minute for each client, of a bounded number of clients."""

    MOST_CLIENTS = 10_000

    def __init__(self, most: int) -> None:
        self._most = most
        self._when: collections.OrderedDict[str, collections.deque[float]] = collections.OrderedDict()

    def allows(self, client: str) -> bool:
        """Whether it may begin another; then it counts."""
        now, when = time.monotonic(), self._when.setdefault(client, collections.deque())
        self._when.move_to_end(client)
        while len(self._when) > self.MOST_CLIENTS:
            self._when.popitem(last=False)
        while when and when[0] < now - 60:
            when.popleft()
        if len(when) >= self._most:
            return False
        when.append(now)
        return True


def refused(status: int, why: str, headers: dict[str, str] | None = None) -> Response:
    """An error in words."""
    return JSONResponse({"error": why}, status, headers)


def _bearer(headers: Headers) -> str:
    kind, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def _cookie(headers: Headers) -> str:
    try:
        held = SimpleCookie(headers.get("cookie", ""))
    except Exception:  # whatever a client sends
        return ""
    return held[COOKIE].value if COOKIE in held else ""


def _host(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""
