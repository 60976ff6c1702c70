"""Heads as the first edition wrote them load, and score as they did: its formulas are written out here."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from inward.errors import HeadError
from inward.heads import store
from inward.heads.base import FORMAT_VERSION
from inward.heads.registry import Registry
from inward.types import BackboneInfo, Reading

RNG = np.random.default_rng(3)
WIDTH = 6
SERVED = {"fingerprint": "sha256:0123456789abcdef0123456789abcdef", "template": "chat:a04e64f49487286d", "depth": 4}


def written(folder, kind, layers, tensors, calibration=None, options=None, **more):
    """The files of a head, with the fields that the first edition wrote, all of them and no other."""
    fields = {
        "format_version": 1,
        "name": folder.name,
        "kind": kind,
        "version": 1,
        "created": "2025-11-21T08:29:25Z",
        "backbone": {"name": "inward-demo", "revision": "0.1.0", "fingerprint": SERVED["fingerprint"]},
        "layers": layers,
        "position": "last",
        "final_norm": False,
        "template": SERVED["template"],
        "calibration": calibration or {},
        "fit": {"data": "sha256:420f", "rows": 270, "seed": 0, "versions": {"inward": "0.1.0"}, "metrics": {}},
        "options": options or {},
    }
    folder.mkdir(parents=True)
    (folder / "head.json").write_text(json.dumps({**fields, **more}, indent=2) + "\n")
    save_file({name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()},
              folder / "head.safetensors")  # fmt: skip
    return folder


def read(head, states_NLD):
    """What a backbone gives for a head: its taps of these states, layer by layer."""
    taps = [
        states_NLD[:, axis] @ tap.weight_DK + (0 if tap.bias_K is None else tap.bias_K)
        for axis, tap in enumerate(head.readout.taps)
    ]
    return Reading(np.concatenate(taps, axis=1).astype(np.float32))


def legend_tensors():
    direction_D = RNG.normal(size=WIDTH)
    return {"direction": direction_D / np.linalg.norm(direction_D)}


def hybrid_tensors(layers):
    return {
        "probe_weight": RNG.normal(size=(layers, WIDTH)),
        "probe_bias": RNG.normal(size=layers),
        "gate_weight": RNG.normal(size=(layers, layers)),
        "mean": RNG.normal(size=(layers, WIDTH)),
        "scale": RNG.uniform(0.5, 2, size=(layers, WIDTH)),
    }


def test_a_legend_head_scores_as_it_did(tmp_path):
    tensors = legend_tensors()
    calibration = {"margin_std": 3.9, "bin_edges": [1.4, 3.1, 5.3], "bin_values": [0.0, 1 / 3, 2 / 3, 1.0]}
    head = store.load(written(tmp_path / "legend", "legend", [2], tensors, calibration), **SERVED, width=WIDTH)
    states_NLD = RNG.normal(size=(2, 1, WIDTH))
    scores = head.score(read(head, states_NLD), pair=True)
    wanted = states_NLD[:, 0] @ tensors["direction"]
    np.testing.assert_allclose(scores.scores_N, wanted, rtol=1e-5)
    margin = wanted[0] - wanted[1]
    assert scores.pair.margin == pytest.approx(margin, rel=1e-5)
    assert scores.pair.margin_scaled == pytest.approx(margin / 3.9, rel=1e-5)
    assert scores.pair.label_agrees is bool(margin > 0)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_a_hybrid_head_scores_as_it_did(tmp_path, gate):
    tensors = hybrid_tensors(3)
    calibration = {
        "platt": {"slope": 1.5, "intercept": -0.25},
        "platt_pair": {"slope": 1.2, "intercept": 0.0},
        "margin_std": 1.0, "bin_edges": [0.5], "bin_values": [0.0, 1.0],
    }  # fmt: skip
    options = {"gate": gate, "confidence": {"alpha": 7.5, "squash": True, "floor": 0.5}}
    head = store.load(written(tmp_path / "hybrid", "hybrid", [1, 2, 4], tensors, calibration, options), **SERVED)
    states_NLD = RNG.normal(size=(2, 3, WIDTH))
    scores = head.score(read(head, states_NLD), pair=True)
    standard_NLD = (states_NLD - tensors["mean"]) / tensors["scale"]
    t_NL = (standard_NLD * tensors["probe_weight"]).sum(-1) + tensors["probe_bias"]
    logits_NL = t_NL @ tensors["gate_weight"].T
    if gate == "sigmoid":
        g_NL = 1 / (1 + np.exp(-logits_NL))
    else:
        g_NL = np.exp(logits_NL) / np.exp(logits_NL).sum(-1, keepdims=True)
    wanted = (g_NL * t_NL).sum(-1)
    np.testing.assert_allclose(scores.scores_N, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores.probability_N, 1 / (1 + np.exp(-(1.5 * wanted - 0.25))), rtol=1e-4)
    squashed = 1 / (1 + np.exp(-wanted))
    gamma = max(0.5, 1 / (1 + np.exp(-7.5 * (squashed[0] - squashed[1]))))
    assert scores.pair.confidence == pytest.approx(gamma, rel=1e-4)


def test_versions_and_the_file_that_says_which_is_served_are_read(tmp_path):
    root = written(tmp_path / "legend", "legend", [2], legend_tensors())
    later = written(tmp_path / "later", "legend", [2], legend_tensors(), name="legend", version=2)
    later.rename(root / "2")
    (root / "active.json").write_text('{"version": 2, "sequence": 5, "updated": 2}\n')
    info = BackboneInfo(
        name="inward-demo", revision="", fingerprint=SERVED["fingerprint"], layers=4, width=WIDTH, max_tokens=99,
        dtype="float32", device="cpu",
    )  # fmt: skip
    registry = Registry.open(tmp_path, info=info, template=SERVED["template"])
    assert registry.snapshot().heads["legend"].ref.version == 2


def test_what_is_saved_without_a_pool_is_what_the_first_edition_reads(tmp_path):
    folder = written(tmp_path / "legend", "legend", [2], legend_tensors())
    before = json.loads((folder / "head.json").read_text())
    store.save(store.load(folder), folder, replace=True)
    assert json.loads((folder / "head.json").read_text()) == before


def test_a_head_of_a_later_format_is_refused_and_says_so(tmp_path):
    folder = written(tmp_path / "legend", "legend", [2], legend_tensors(), format_version=FORMAT_VERSION + 1)
    with pytest.raises(HeadError, match="upgrade Inward"):
        store.load(folder)
