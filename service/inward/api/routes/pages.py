"""Pages for people: the playground at ``/`` and the API's documentation at ``/docs``, with everything that they need.

They are files in ``api/playground``, as they are: nothing is built, and nothing comes from another host. Swagger UI
comes with the package ``fastapi-swagger``.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from pathlib import Path as FilePath

from fastapi import APIRouter, Path, Request, Response

from inward.errors import NotFound

FOLDER = FilePath(__file__).parents[1] / "playground"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
SWAGGER = ("swagger-ui-bundle.js", "swagger-ui.css")
POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; form-action 'none'"
)
"""Of the contents: nothing from elsewhere is loaded, and nothing is sent elsewhere. Swagger UI writes styles inline."""
HEADERS = {
    "content-security-policy": f"{POLICY}; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def playground(request: Request) -> Response:
    """The playground."""
    return _file(request, "index.html")


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Swagger UI on ``/openapi.json``."""
    return _file(request, "docs.html")


@router.get("/playground/{name:path}")
async def part(request: Request, name: str = Path(max_length=100)) -> Response:
    """What the pages need."""
    return _file(request, name)


def _file(request: Request, name: str) -> Response:
    if name not in _names():
        raise NotFound("there is no such page; the playground is at /")
    content, tag = _content(name)
    headers = {**HEADERS, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=TYPES[FilePath(name).suffix])


@cache
def _names() -> frozenset[str]:
    """The files of the folder and Swagger UI's, and nothing beyond them."""
    own = {file.name for file in FOLDER.iterdir() if file.suffix in TYPES}
    return frozenset(own | {f"swagger/{name}" for name in SWAGGER})


@cache
def _content(name: str) -> tuple[bytes, str]:
    folder, _, file = name.rpartition("/")
    content = (resources.files("fastapi_swagger.resources") if folder else FOLDER).joinpath(file).read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:16]}"'
