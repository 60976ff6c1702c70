import numpy as np
import pytest

from inward.errors import HeadError
from inward.heads import store
from inward.heads.ensemble import EnsembleHead
from inward.heads.hybrid import HybridHead
from inward.heads.legend import LegendHead
from inward.types import Reading
from support.small_heads import BACKBONE, legend, manifest

TOKENS = frozenset({"tokens"})


def hybrid(**changes):
    rng = np.random.default_rng(3)
    shapes = {"probe_weight": (2, 4), "probe_bias": (2,), "gate_weight": (2, 2), "mean": (2, 4)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tensors["scale"] = np.ones((2, 4), np.float32)
    return HybridHead.from_tensors(manifest(name="gated", kind="hybrid", layers=(1, 2), **changes), tensors)


def ensemble(*parts, weights=(0.25, 2.0), centres=(1.0, -0.5), spreads=(2.0, 0.5), **changes):
    parts = parts or (legend(name="plain"), hybrid())
    options = {
        "parts": [
            {"manifest": part.manifest.model_dump(mode="json"), "weight": w, "centre": c, "spread": s}
            for part, w, c, s in zip(parts, weights, centres, spreads, strict=True)
        ]
    }
    tensors = {f"{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.tensors().items()}
    own = manifest(name="both", kind="ensemble", layers=(1, 2), options=options, **changes)
    return EnsembleHead.from_tensors(own, tensors)


def reading(n=3, tokens=0, k=3):
    rng = np.random.default_rng(7)
    values = rng.normal(size=(n, k)).astype(np.float32)
    return Reading(values, tuple(rng.normal(size=(tokens, k)).astype(np.float32) for _ in range(n)) if tokens else None)


def test_it_is_the_weighted_sum_of_standardised_scores_of_one_readout():
    head, read = ensemble(), reading()
    assert [tap.layer for tap in head.readout.taps] == [2, 1, 2]
    plain = legend(name="plain").score(Reading(read.values_NK[:, :1])).scores_N
    gated = hybrid().score(Reading(read.values_NK[:, 1:])).scores_N
    wanted = [0.25 * (a - 1.0) / 2.0 + 2.0 * (b + 0.5) / 0.5 for a, b in zip(plain, gated, strict=True)]
    assert head.score(read).scores_N == pytest.approx(wanted)


def test_a_pair_has_a_margin_and_a_confidence():
    head, read = ensemble(), reading(2)
    said = head.score(read, pair=True)
    assert said.pair.margin == pytest.approx(said.scores_N[0] - said.scores_N[1])
    assert 0.5 <= said.pair.confidence <= 1 and said.pair.bin is not None


def test_a_part_without_a_finite_score_leaves_no_sum():
    read = reading()
    read.values_NK[1, 2] = np.nan
    assert [score is None for score in ensemble().score(read).scores_N] == [False, True, False]


def test_token_scores_are_sums_too_and_layers_stand_one_part_after_the_other():
    read = reading(2, tokens=4)
    said = ensemble().score(read, details=frozenset({"tokens", "layers"}))
    plain = read.tokens_TK[0][:, 0]
    gated = hybrid().rewards(read.tokens_TK[0][:, 1:])[0]
    np.testing.assert_allclose(said.tokens_N[0], 0.25 * (plain - 1) / 2 + 2 * (gated + 0.5) / 0.5, rtol=1e-5)
    assert said.layers_N[0].layers == (2, 1, 2)
    assert said.layers_N[0].values[0] == pytest.approx(float(read.values_NK[0, 0]))


def test_parts_that_pool_make_it_pool():
    pooled = LegendHead.from_tensors(manifest(name="pooled", pool={"name": "topk", "k": 2}), legend().tensors())
    head, read = ensemble(pooled, hybrid()), reading(1, tokens=5)
    assert head.pools and not ensemble().pools
    lowest = np.sort(read.tokens_TK[0][:, 0])[:2].mean()
    gated = hybrid().score(Reading(read.values_NK[:, 1:])).scores_N[0]
    assert head.score(read).scores_N[0] == pytest.approx(0.25 * (lowest - 1) / 2 + 2 * (gated + 0.5) / 0.5)


def test_it_is_stored_whole(tmp_path):
    head = ensemble()
    folder = store.save(head, tmp_path / "both")
    loaded = store.load(folder, fingerprint=BACKBONE.fingerprint, template=head.manifest.template, depth=4, width=4)
    assert loaded.ref.kind == "ensemble"
    assert loaded.score(reading()).scores_N == head.score(reading()).scores_N
    assert set(loaded.tensors()) == {"0.direction", *(f"1.{name}" for name in hybrid().tensors())}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": {"parts": []}}, "options.parts"),
        ({"options": {}}, "options.parts"),
        ({"backbone": {"name": "other", "fingerprint": "sha256:other"}}, "another backbone"),
        ({"template": "format:x{prompt}{response}"}, "template"),
    ],
)
def test_what_does_not_go_together_is_refused(change, said):
    head = ensemble()
    fields = {**head.manifest.model_dump(mode="json"), **change}
    with pytest.raises(HeadError, match=said):
        EnsembleHead.from_tensors(type(head.manifest).model_validate(fields), head.tensors())


def test_a_tensor_of_no_part_or_a_missing_one_is_refused():
    head = ensemble()
    with pytest.raises(HeadError, match="no part"):
        EnsembleHead.from_tensors(head.manifest, {**head.tensors(), "7.direction": np.zeros(4, np.float32)})
    with pytest.raises(HeadError, match="lacks direction"):
        EnsembleHead.from_tensors(head.manifest, {k: v for k, v in head.tensors().items() if k != "0.direction"})
