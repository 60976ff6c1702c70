"""The OpenAPI document of the app, as it is committed in ``clients/openapi.json``; ``make contract`` writes it."""

from __future__ import annotations

import json
from pathlib import Path

from support.fake_services import FakeServices

COMMITTED = Path(__file__).parents[2] / "clients" / "openapi.json"


def live() -> str:
    """As JSON, in an order that does not depend on the order of the code."""
    return json.dumps(FakeServices().app.openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    COMMITTED.write_text(live(), encoding="utf-8")
