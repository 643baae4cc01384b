"""Serving the studio: on this machine alone, to pages of its own, with nothing asked of the network."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from importlib.util import find_spec
from typing import Any

from halfstep.app.exploring import Exploration
from halfstep.core.errors import RunError

HOST, PORT = "127.0.0.1", 7860
MOST_BYTES = 1 << 20
"""Of one request: a page sends a few numbers and a prompt."""
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self'; frame-ancestors 'none'; "
    "base-uri 'self'; form-action 'self'"
)
"""The browser itself keeps the page from asking anybody else."""


def require_studio() -> None:
    """Raise RunError where Gradio is not installed."""
    if find_spec("gradio") is None:
        do = "pip install 'halfstep[studio]'"
        raise RunError(got="no gradio", expected="it: the studio is a page of it", where="halfstep studio", do=do)


def require_free(port: int) -> None:
    """Raise RunError for a port in use, with the next one that is free."""
    if not is_free(port):
        free = next((one for one in range(port + 1, min(port + 100, 65536)) if is_free(one)), None)
        do = "choose another" if free is None else f"write --port {free}, which is free"
        raise RunError(got=f"port {port}, which is in use", expected="a free one", where="--port", do=do)


def is_free(port: int) -> bool:
    """Whether nobody listens on a port of this machine."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((HOST, port))
        except OSError:
            return False
        return True


class Guarded:
    """ASGI middleware: requests by this machine's own name and of bounded length alone, and the policy for browsers.

    A page elsewhere that has its own name lead here (DNS rebinding) is refused by the name.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = _refusal(dict(scope["headers"]))
        if refused is not None:
            await send({"type": "http.response.start", "status": refused, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        await self.app(scope, receive, with_policy)


def _refusal(headers: Mapping[bytes, bytes]) -> int | None:
    """The status with which a request is refused; None: it is not."""
    if headers.get(b"host", b"").rpartition(b":")[0] not in (HOST.encode(), b"localhost"):
        return 403
    length = headers.get(b"content-length", b"0")
    if b"transfer-encoding" in headers or not length.isdigit():
        return 411
    return 413 if len(length) > 12 or int(length) > MOST_BYTES else None


@contextmanager
def served(runs: Mapping[str, Exploration], port: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Serve a page over these runs; gives its address, and what waits until it ends. Raises RunError as
    `require_free`."""
    require_free(port)
    with tempfile.TemporaryDirectory(prefix="halfstep-studio-") as place:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": place, "GRADIO_SSR_MODE": "False"}
        for name in ("no_proxy", "NO_PROXY"):  # a proxy of the user's does not know this machine
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST, "localhost"]))
        from halfstep.app.panels import CSS
        from halfstep.app.studio import Page, theme

        page = Page(runs).build().queue(max_size=32, default_concurrency_limit=1)
        from starlette.middleware import Middleware

        how: dict[str, Any] = {"middleware": [Middleware(Guarded)], "docs_url": None, "redoc_url": None}
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            show_error=True,
            prevent_thread_lock=True,
            allowed_paths=[],
            footer_links=[],
            max_file_size=1,
            state_session_capacity=100,
            app_kwargs=how,
            css=CSS,
            theme=theme(),
        )
        try:
            yield address, page.block_thread
        finally:
            page.close(verbose=False)
