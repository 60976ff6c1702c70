"""The HTTP side as one ASGI app."""

from __future__ import annotations

from functools import cache

from fastapi import APIRouter, FastAPI, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.middleware import Middleware
from starlette.routing import BaseRoute

from inward import __version__
from inward.api import errors
from inward.api.auth import HEALTH, Auth
from inward.api.idempotency import Idempotency
from inward.api.middleware import AccessLog, HeadAsGet, RequestBody
from inward.api.routes import admin, compat_rerank, compat_training, compat_vllm, jobs, native, openai, pages, verdicts
from inward.api.services import Services

DESCRIPTION = (
    "Rewards read from inside the model: safety margins of preference pairs, scores and rankings, from one forward "
    "pass.\n\n"
    'Every error has one shape, `{"error": {"message", "type", "param", "code"}}`. An item of a list that can\'t be '
    "scored gets a null score\n"
    "and an `error` in its place; if that is so of all of them, the request fails with the first one's error. Answers "
    "carry `x-request-id`,\n"
    "`x-queue-time`, `x-inference-time` and `x-total-time` (milliseconds)."
)
ROUTERS = (
    native.router,
    jobs.router,
    admin.router,
    openai.router,
    verdicts.router,
    compat_training.router,
    compat_training.gym,
    compat_rerank.v1,
    compat_rerank.v2,
    compat_vllm.router,
    pages.router,
)
PATHS = frozenset(
    {route.path for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)} | {"/openapi.json"}
)


def create_app(services: Services) -> FastAPI:
    """The app on these services. It starts nothing and stops nothing: that is ``wiring``'s."""
    limits, uploads = services.limits, {"/jobs": services.limits.upload_bytes}
    app = FastAPI(
        title="Inward",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,  # ``pages`` has them, without anything from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        routes=list(_routes()),
        middleware=[  # in the order in which a request passes them
            Middleware(AccessLog, paths=PATHS),
            Middleware(HeadAsGet),
            Middleware(
                Auth, keys=services.keys, open_paths=HEALTH | ({"/metrics"} if services.metrics_open else set())
            ),
            Middleware(RequestBody, limit=limits.body_bytes, seconds=limits.body_s, uploads=uploads),
            Middleware(Idempotency, store=services.idempotency, uploads=uploads.keys()),
        ],
    )
    app.state.services = services
    errors.install(app)
    return app


@cache
def _routes() -> tuple[BaseRoute, ...]:
    """All routes. They know no services, so they are made once, which takes a tenth of a second."""
    bearer = HTTPBearer(auto_error=False, description="Where the server has API keys.")
    together = APIRouter(dependencies=[Security(bearer)])  # for the document; Auth checks
    for router in ROUTERS:
        together.include_router(router)
    return tuple(together.routes)
