"""From bytes to JSON, before pydantic looks at it: what isn't JSON is a 400, and a list that is too long is a 413."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from inward.api.services import Limits, Services
from inward.errors import RequestError, TooLarge

ITEMS = ("pairs", "items", "query", "messages", "input", "text_1", "text_2", "queries")
"""Fields whose lists are scored one by one."""
CANDIDATES = ("candidates", "documents", "texts")
"""Fields whose lists answer one prompt."""


class JsonRoute(APIRoute):
    """A route whose body is parsed by ``parse`` and limited by ``limit_lists``, instead of by FastAPI's more
    generous ways.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler that Starlette calls."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def parsed(request: Request) -> Response:
            services: Services = request.app.state.services
            raw = await request.body()
            value = parse(raw, request.headers.get("content-type", ""))
            limit_lists(value, services.limits)
            return await handle(_Parsed(request, raw, value))

        return parsed


class _Parsed(Request):
    """A request whose body is parsed already."""

    def __init__(self, request: Request, raw: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._raw, self._value = raw, value

    async def body(self) -> bytes:
        return self._raw

    async def json(self) -> Any:
        return self._value


def parse(raw: bytes, content_type: str) -> Any:
    """The JSON value of a body.

    The type must be said, because a browser lets any page send other types to an address that only its user can reach.

    Raises:
        RequestError: empty, not declared as JSON, no JSON, or with NaN or Infinity, which Python would take.
    """
    if not raw:
        raise RequestError("the body is empty; send a JSON object")
    kind = content_type.partition(";")[0].strip().lower()
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        raise RequestError('send the header "content-type: application/json"', param="content-type")
    try:
        return strict_json(raw)
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not JSON: byte {error.start} is not UTF-8") from None
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None


def limit_lists(value: Any, limits: Limits) -> None:
    """Refuses more elements than a request may have, before each of them is looked at.

    Raises:
        TooLarge: names the list, its length and the limit.
    """
    if not isinstance(value, dict):
        return
    for field, limit in [
        *((field, limits.items) for field in ITEMS),
        *((field, limits.candidates) for field in CANDIDATES),
    ]:
        elements = value.get(field)
        if isinstance(elements, list) and len(elements) > limit:
            raise TooLarge(
                f"{field} has {len(elements)} elements and one request may have {limit}; send several", param=field
            )


def strict_json(raw: bytes | str) -> Any:
    """Raises ValueError also for NaN and Infinity, which Python would take."""
    return json.loads(raw, parse_constant=_no_number)


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
