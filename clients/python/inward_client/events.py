"""Server-sent events of ``/rerank`` with ``stream``: drawn answers one by one, then the ranking."""

from __future__ import annotations

import json

from inward_client.answers import Ranked, RerankAnswer, read
from inward_client.errors import CODES, UnreadableAnswer, of_status

Event = Ranked | RerankAnswer


class Events:
    """Puts events together from lines.

    Args:
        request_id: of the request, for its errors.
    """

    def __init__(self, request_id: str | None) -> None:
        self._request_id = request_id
        self._name = ""
        self._finished = False

    def line(self, line: str) -> Event | None:
        """Takes the next line; gives the event that it completes.

        Raises:
            StatusError: the service could not go on.
            UnreadableAnswer: the line is none of the service's.
        """
        field, _, value = line.partition(": ")
        if field == "event":
            self._name = value
        if field != "data" or value == "[DONE]":
            return None
        try:
            body = json.loads(value)
        except ValueError:
            raise UnreadableAnswer("an event can't be read") from None
        if self._name == "sample":
            return read(Ranked, body)
        if self._name == "result":
            self._finished = True
            return read(RerankAnswer, body)
        if self._name == "error":
            told = body["error"]
            status = CODES.get(told["code"], 500)
            raise of_status(status)(
                told["message"], status=status, code=told["code"], param=told.get("param"), request_id=self._request_id
            )
        return None  # an event of a newer service

    def end(self) -> None:
        """Nothing more comes.

        Raises:
            UnreadableAnswer: the ranking has not come.
        """
        if not self._finished:
            raise UnreadableAnswer("the stream ended before the ranking")
