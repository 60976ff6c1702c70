"""Bulk jobs of the client, around a real Redis."""

import pytest

from inward_client import Inward
from support.fleet import Fleet
from support.serving import write_model
from support.waiting import wait_until


def test_a_job_is_uploaded_watched_and_fetched_in_the_order_of_its_rows(redis_server, tmp_path):
    write_model(tmp_path)
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "source": i} for i in range(30)]
    with Fleet(tmp_path, redis_server.url) as fleet:
        api, worker = fleet.api(), fleet.worker()
        fleet.wait_until_ready(api, worker)
        with Inward(api.url, timeout=300) as inward:
            job = inward.create_job("margin", rows)
            assert (job.rows, job.kind) == (30, "margin")
            wait_until(lambda: inward.job(job.id).state == "done")
            results = inward.job_results(job.id)
            now = inward.margin(rows)
            assert inward.cancel_job(job.id).state == "done"
    assert [row["index"] for row in results] == list(range(30))
    assert [row["margin"] for row in results] == pytest.approx([m.margin for m in now.margins])
