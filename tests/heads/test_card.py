import json

import numpy as np
import pytest

from inward.heads import store
from inward.heads.calibration import Acceptable
from inward.heads.card import KINDS, POSITIONS, card, headline
from inward.processes.wiring import MODELS

FOLDERS = sorted(path.parent for path in MODELS.glob("*/heads/*/head.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parents[1].name}/{folder.name}")
def test_a_card_tells_what_the_manifest_says_in_words(folder):
    manifest = store.load_manifest(folder)
    said = card(manifest)
    assert said.startswith(f"# {manifest.name}\n\nA head of kind `{manifest.kind}`: {KINDS[manifest.kind]}")
    for part in (manifest.backbone.fingerprint, manifest.created, POSITIONS[manifest.position], "inward evaluate"):
        assert part in said
    assert "hf://" not in said and "hf://org/x" in card(manifest, at="org/x")
    assert headline(manifest)["base model"] == manifest.backbone.name


def test_a_head_without_calibration_says_so():
    manifest = store.load_manifest(FOLDERS[0])
    bare = manifest.model_copy(update={"calibration": {}, "fit": {}})
    assert "It is not calibrated" in card(bare) and "The fit kept no measurements" in card(bare)
    assert headline(bare)["accuracy"] == ""


def test_accuracy_is_the_held_out_one():
    folder = next(folder for folder in FOLDERS if folder.parts[-3:] == ("toy", "heads", "hybrid"))
    metrics = json.loads((folder / "head.json").read_text())["fit"]["metrics"]
    accuracy = headline(store.load_manifest(folder))["accuracy"]
    assert accuracy == f"{metrics['accuracy']:.1%} of {metrics['pairs']} pairs"


def test_a_small_fit_has_no_thresholds_to_tell():
    """Of two responses only the half below is known."""
    manifest = store.load_manifest(FOLDERS[0])
    few = manifest.model_copy(update={"calibration": {"margin_std": 1.0, **Acceptable.fit([0.1, 0.2]).dump()}})
    many = manifest.model_copy(update={"calibration": Acceptable.fit(np.arange(200.0)).dump()})
    assert "Thresholds" not in card(few) and "Thresholds: 1.0% of acceptable" in card(many)
