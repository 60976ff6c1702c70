import json

from inward.offline.annotate import argilla
from inward.offline.annotate.decisions import key_of
from inward.offline.annotate.scorer import Annotated
from inward_client.rows import LAYOUTS, PairReader

READER = PairReader(LAYOUTS["trl"])
ROW = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def annotated(margin, agrees, probability=None):
    return Annotated({"margin": margin, "label_agrees": agrees, "label_probability": probability})


def test_records_have_fields_metadata_and_the_heads_suggestion(tmp_path):
    rows = [(1, ROW, annotated(2.0, True, 0.9)), (3, ROW, annotated(-1.0, False, 0.25)), (4, ROW, annotated(0.0, None))]
    argilla.write(tmp_path / "records.json", [("in", iter(rows))], READER, "hybrid")
    right, flip, tie = json.loads((tmp_path / "records.json").read_text())
    assert right["fields"] == ROW and right["suggestions"]["label"] == {
        "value": "right",
        "score": 0.9,
        "agent": "hybrid",
    }
    assert flip["suggestions"]["label"] == {"value": "flip", "score": 0.75, "agent": "hybrid"}
    assert tie["suggestions"] == {}
    key = key_of(READER.pair(ROW))
    assert flip["metadata"] == {"margin": -1.0, "label_probability": 0.25, "source": "in", "row": 3, "key": key}
    assert len({right["id"], flip["id"], tie["id"]}) == 3


def test_nothing_is_an_empty_list(tmp_path):
    argilla.write(tmp_path / "records.json", [], READER, "hybrid")
    assert json.loads((tmp_path / "records.json").read_text()) == []
