"""Whatever goes wrong in a route, told in the one error shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from inward.api.answers import plain, refusal
from inward.errors import InvalidField, InwardError, NotFound
from inward.wire import UNION_TAGS, ErrorBody
from inward.wire.compat import COMPAT_TAGS

PHRASES = {
    "missing": "is missing",
    "extra_forbidden": "is not a field of this request",
    "is_instance_of": "must be a string",
    "string_unicode": "has a name or value that is not Unicode text",
    "too_short": "must not be empty",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "wrong_form": "",
}
"""Our words for pydantic's, where its own speak of Python."""
Responses = dict[int | str, dict[str, Any]]
"""What else than the answer a route may give, for the OpenAPI document."""


def told(descriptions: Mapping[int, str]) -> Responses:
    """Errors in our own shape, by their status."""
    return {status: {"model": ErrorBody, "description": description} for status, description in descriptions.items()}


OVER_QUOTA = told({429: "The key has used up its quota; `Retry-After` says when it has more."})
RESPONSES = told(
    {
        400: "The body is not JSON.",
        401: "No key, or a wrong one.",
        404: "No such head or version.",
        413: "The body, the number of items, or (where no item is left) a text is over the limit.",
        415: "The body is compressed.",
        422: "A field is missing, unknown or of a wrong type, or no item can be scored; `param` names it.",
        500: "A defect of ours.",
        503: "Overloaded or not able to compute; `Retry-After` says when to come back.",
        504: "Not done before the deadline.",
    }
)
"""The errors of scoring routes."""


def only(*statuses: int) -> Responses:
    """Of ``RESPONSES`` those."""
    return {status: RESPONSES[status] for status in statuses}


def responses(*models: Any) -> Responses:
    """``RESPONSES`` of routes on which errors have one of these shapes; what goes wrong before the route keeps our
    own.
    """
    either = reduce(or_, models, ErrorBody)
    return {status: {**response, "model": either} for status, response in RESPONSES.items()}


def install(app: FastAPI) -> None:
    """Registers the handlers. What they don't catch is a defect, which the middleware answers with a 500."""
    app.add_exception_handler(InwardError, _inward)
    app.add_exception_handler(RequestValidationError, _shape)
    app.add_exception_handler(HTTPException, _http)


def explain(problems: Sequence[Mapping[str, Any]]) -> InvalidField:
    """The first of pydantic's problems, without the value that caused it, in our words and with the path of the field.

    ``problems`` have a ``loc`` that begins with the part of the request, as in ``("body", "pairs", 3, "chosen")``.
    """
    first = problems[0]
    context = first.get("ctx", {})
    steps = [str(step) for step in first["loc"][1:] if step not in UNION_TAGS | COMPAT_TAGS]
    if first["type"] == "wrong_form":
        steps.append(context["field"])
        phrase = context["problem"]
    else:
        phrase = PHRASES.get(first["type"]) or first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    param = ".".join(steps)[:200] or None
    more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
    return InvalidField(f"{param or 'the body'} {phrase}{more}", param=param)


async def _inward(request: Request, error: Exception) -> Response:
    assert isinstance(error, InwardError)
    return refusal(error)


async def _shape(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return refusal(explain(error.errors()))


async def _http(request: Request, error: Exception) -> Response:
    """Starlette's own: an unknown route or a method that a route doesn't have."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return refusal(NotFound("there is no such route; GET /openapi.json lists them"))
    code, message = "bad_request", str(error.detail)
    if error.status_code == 405:
        code, message = "method_not_allowed", "this route does not take this method"
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return plain(body, status=error.status_code, headers=error.headers)
