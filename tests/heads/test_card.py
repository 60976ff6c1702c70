import json

import pytest

from inward.heads import store
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
    accuracy = json.loads((folder / "head.json").read_text())["fit"]["metrics"]["accuracy"]
    assert headline(store.load_manifest(folder))["accuracy"] == f"{accuracy:.1%}"
