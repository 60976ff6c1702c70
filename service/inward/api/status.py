"""The few routes of a process that serves no requests: a worker says how it is, and is scraped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Response
from starlette.middleware import Middleware

from inward import __version__, metrics
from inward.api import errors
from inward.api.answers import plain
from inward.api.middleware import HeadAsGet
from inward.errors import EngineDead, Unavailable


def create_status_app(
    ready: Callable[[], tuple[bool, str]], alive: Callable[[], bool], info: Callable[[], Mapping[str, Any]]
) -> FastAPI:
    """``/livez /readyz /health /info /metrics``, which mean what they mean in the API; nothing here is secret."""
    app = FastAPI(
        title="Inward worker",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[Middleware(HeadAsGet)],
    )
    errors.install(app)

    @app.get("/livez")
    async def livez() -> Response:
        if not alive():
            raise EngineDead("the engine is dead; restart the process", retry_after=10.0)
        return plain({"status": "alive"})

    @app.get("/health")
    @app.get("/readyz")
    async def readyz() -> Response:
        well, reason = ready()
        if not well:
            raise Unavailable(reason, retry_after=10.0)
        return plain({"status": reason})

    @app.get("/info")
    async def info_() -> Response:
        return plain(dict(info()))

    @app.get("/metrics")
    async def metrics_() -> Response:
        return Response(metrics.exposition(), media_type=metrics.CONTENT_TYPE)

    return app
