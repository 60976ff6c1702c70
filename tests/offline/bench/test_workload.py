"""What is measured: heads made of noise, which the store takes as it takes any others."""

import pytest

from inward.heads import store
from inward.offline.bench.workload import write_random_heads
from inward.types import BackboneInfo

INFO = BackboneInfo("bench", "", "sha256:0", 4, 16, 0, "", "")


@pytest.mark.parametrize("pool", [None, "max_rolling:window=3", "attention"])
def test_random_heads_load_and_pool_as_they_were_asked_to(tmp_path, pool):
    write_random_heads(INFO, "t", tmp_path, 3, pool)
    heads = [store.load(found.path, fingerprint="sha256:0") for found in store.find(tmp_path)]
    assert sorted(head.manifest.layers[0] for head in heads) == [2, 3, 4]
    assert [head.pools for head in heads] == [pool is not None] * 3
