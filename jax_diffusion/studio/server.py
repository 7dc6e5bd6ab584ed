"""The page's server: it listens on 127.0.0.1 alone, and the page fetches from nowhere else."""

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from jax_diffusion.errors import UserError

HOST = "127.0.0.1"
# In some versions Gradio's page names fonts and a script of other hosts, which it does without.
FOREIGN = re.compile(rb'<link\b[^>]*\bhref="(?:https?:)?//[^>]*>|<script\b[^>]*\bsrc="(?:https?:)?//[^>]*>\s*</script>')
# What may slip through, the browser does not fetch. Nor does it show the page inside another.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' blob: 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
)


def listen(port: int) -> socket.socket:
    """A socket that listens on 127.0.0.1; port 0 is any free one. Raises UserError where it cannot."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port={port}: give 1 to 65535, or 0 for any free one")
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # a page that was just ended still holds its port for a minute
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
        listening.listen()
    except OSError as e:
        listening.close()
        raise UserError(
            f"--port={port}: {(e.strerror or str(e)).lower()}; choose another, or 0 for any free one"
        ) from None
    return listening


class Local:
    """An ASGI application around another: pages leave it without references to other hosts."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Uncompressed, so that it can be read here.
        scope = {**scope, "headers": [h for h in scope["headers"] if h[0] != b"accept-encoding"]}
        start: dict[str, Any] = {}
        page = bytearray()

        async def sending(message: dict) -> None:
            if message["type"] == "http.response.start":
                headers = dict(message["headers"])
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                if headers.get(b"content-type", b"").startswith(b"text/html"):
                    start.update(message)
                    return
            elif message["type"] == "http.response.body" and start:
                page.extend(message.get("body", b""))
                if message.get("more_body"):
                    return
                body = FOREIGN.sub(b"", bytes(page))
                start["headers"] = [h for h in start["headers"] if h[0] != b"content-length"]
                start["headers"].append((b"content-length", str(len(body)).encode()))
                await send(start)
                message = {"type": "http.response.body", "body": body}
            await send(message)

        await self.app(scope, receive, sending)


def application(blocks: Any, **options: Any) -> Callable:
    """The ASGI application of a Gradio page. options: of gradio.mount_gradio_app."""
    import gradio
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = gradio.mount_gradio_app(FastAPI(openapi_url=None), blocks, path="", ssr_mode=False, **options)
    # A page of another site that has its own name point here is turned away.
    return TrustedHostMiddleware(Local(app), allowed_hosts=[HOST, "localhost"])


def serve(app: Callable, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Serves until Ctrl-C, which ends the process at once. ready: called when the page can be opened."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            time.sleep(0.02)
        if server.started:
            ready()
        while thread.is_alive():
            thread.join(3600)
    except KeyboardInterrupt:
        print("jax-diffusion: interrupted", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # a compilation, and threads that wait for browsers, would be waited for
    raise UserError("the page's server has ended: its own error is above")
