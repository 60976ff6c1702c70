"""The HTTP side as one ASGI app.

A request passes, from outside in: ``AccessLog`` (id, timing, metrics, event), ``Auth``, ``Door`` (body limit, hang-up),
``Once`` (idempotency keys), the routes.
"""

from __future__ import annotations

from fastapi import FastAPI, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from inward import __version__
from inward.api import errors
from inward.api.auth import HEALTH, Auth
from inward.api.idempotency import Idempotency
from inward.api.middleware import AccessLog, Door
from inward.api.routes import admin, compat_rerank, compat_training, compat_vllm, jobs, native
from inward.api.services import Services

DESCRIPTION = """Rewards read from inside the model: safety margins of preference pairs, scores and rankings, from one forward pass.

Every error has one shape, `{"error": {"message", "type", "param", "code"}}`. An item of a list that can't be scored gets a null score
and an `error` in its place; if that is so of all of them, the request fails with the first one's error. Answers carry `x-request-id`,
`x-queue-time`, `x-inference-time` and `x-total-time` (milliseconds)."""


def create_app(services: Services) -> FastAPI:
    """The app on these services. It starts nothing and stops nothing: that is ``wiring``'s."""
    app = FastAPI(title="Inward", version=__version__, description=DESCRIPTION, redirect_slashes=False)
    app.state.services = services
    errors.install(app)
    key = [
        Security(HTTPBearer(auto_error=False, description="Where the server has API keys."))
    ]  # for the document; Auth checks
    foreign = (compat_training.router, compat_training.gym, compat_rerank.v1, compat_rerank.v2, compat_vllm.router)
    for part in (native.router, jobs.router, admin.router, *foreign):
        app.include_router(part, dependencies=key)
    paths = {route.path for route in app.routes if isinstance(route, APIRoute)} | {"/docs", "/redoc", "/openapi.json"}
    uploads = {"/jobs": services.limits.upload_bytes}
    app.add_middleware(
        Idempotency, answered=services.answered, uploads=uploads.keys()
    )  # the last one added is the outermost
    app.add_middleware(Door, limit=services.limits.body_bytes, seconds=services.limits.body_s, uploads=uploads)
    app.add_middleware(Auth, keys=services.keys, open_paths=HEALTH | ({"/metrics"} if services.metrics_open else set()))
    app.add_middleware(AccessLog, paths=paths)
    return app
