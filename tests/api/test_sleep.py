"""``/sleep`` and ``/wake``: a service that lends its device answers nobody, and everybody again afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest

from api.test_drawn import serving
from inward.api.app import create_app
from inward.backbones.transformers.backbone import TransformersBackbone
from inward.errors import Conflict
from support.fake_services import FakeServices, error

ITEM = {"items": [{"prompt": "p", "response": "r"}]}


async def test_asleep_requests_get_503_and_awake_their_answer():
    async with serving() as (api, c):
        api.services = replace(api.services, sleeper=c.backbone)
        api.app = create_app(api.services)
        before = (await api.post("/score", ITEM)).json()
        for _ in range(2):
            assert (await api.post("/sleep")).json() == {"asleep": True}
        refused = await api.post("/score", ITEM)
        assert (refused.status_code, error(refused)["code"]) == (503, "unavailable")
        assert "POST /wake" in error(refused)["message"]
        for _ in range(2):
            assert (await api.post("/wake")).json() == {"asleep": False}
        assert (await api.post("/score", ITEM)).json() == before


async def test_a_replica_without_a_backbone_has_nothing_that_could_sleep():
    refused = await FakeServices().post("/sleep")
    assert (refused.status_code, error(refused)["code"]) == (409, "conflict")


async def test_a_backbone_that_can_not_sleep_says_what_would():
    with pytest.raises(Conflict, match="--backbone vllm"):
        await TransformersBackbone.sleep(None)
