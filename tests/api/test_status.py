"""What a worker, which serves no requests, says of itself."""

import httpx
import pytest

from inward.api.status import create_status_app


def client(*, ready=(True, "ready"), alive=True):
    app = create_status_app(lambda: ready, lambda: alive, lambda: {"worker": "w1"})
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://worker")


async def test_a_worker_says_how_it_is():
    async with client() as well, client(ready=(False, "loading"), alive=False) as ill:
        assert (await well.get("/readyz")).json() == (await well.get("/health")).json() == {"status": "ready"}
        assert (await well.get("/info")).json() == {"worker": "w1"}
        red = await ill.get("/readyz")
        assert (red.status_code, red.headers["retry-after"], red.json()["error"]["message"]) == (503, "10", "loading")
        assert (await ill.get("/livez")).json()["error"]["code"] == "engine_dead"


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/info", "/metrics"])
async def test_head_is_get_without_a_body(path):
    async with client() as worker:
        got, head = await worker.get(path), await worker.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers == got.headers or path == "/metrics"
