import json

import httpx
import pytest

from inward_client import DataError, InvalidField, Inward, annotate
from inward_client.answers import Head, ItemError, Margin, MarginAnswer
from inward_client.frames import COLUMNS, ERROR

ROWS = [
    {"prompt": "q", "chosen": "three words here", "rejected": "one", "id": 0},
    {"prompt": "q", "chosen": "bad", "rejected": "one", "id": 1},
    {"prompt": "q", "chosen": "same", "rejected": "same", "id": 2},
    {"prompt": None, "chosen": None, "rejected": None, "id": 3},
    {"prompt": "q", "chosen": "one", "rejected": "two words", "id": 4},
]
MARGINS = [2.0, None, 0.0, None, -1.0]


def answered(request):
    """A margin is the difference in words; an answer that is bad can't be scored."""

    def margin(n, pair):
        if pair["chosen"] == "bad":
            param = f"pairs.{n}.chosen"
            return {"margin": None, "error": {"message": f"{param} is too bad", "type": "", "param": param, "code": ""}}
        value = len(pair["chosen"].split()) - len(pair["rejected"].split())
        return {"margin": float(value), "bin": 0.5, "label_agrees": value >= 0, "label_probability": 0.75}

    pairs = json.loads(request.content)["pairs"]
    head = {"name": "legend", "kind": "legend", "version": 1}
    return httpx.Response(
        200,
        json={
            "model": "m",
            "policy_version": "base",
            "head": head,
            "margins": [margin(n, pair) for n, pair in enumerate(pairs)],
        },
    )


@pytest.fixture
def client():
    http = httpx.AsyncClient(transport=httpx.MockTransport(answered))
    with Inward("http://service", http=http, batch_size=2) as one:
        yield one


def checked(columns):
    """The new columns as lists."""
    assert columns["margin"] == MARGINS
    assert columns["label_agrees"] == [True, None, None, None, False]
    assert columns["margin_bin"] == [0.5, None, 0.5, None, 0.5]
    assert columns[ERROR][0] is None and columns[ERROR][1] == "chosen is too bad" and "'prompt'" in columns[ERROR][3]


def asking(answer):
    """A client of a service, and what it was asked."""
    asked = []
    http = httpx.AsyncClient(transport=httpx.MockTransport(lambda request: (asked.append(request), answer(request))[1]))
    return Inward("http://service", http=http, batch_size=2), asked


@pytest.mark.parametrize("status", [422, 413])
@pytest.mark.parametrize("n", [1, 3])
def test_where_no_row_can_be_scored_each_has_its_own_reason(status, n):
    def refused(request):
        answer = json.loads(request.content)["pairs"][0]["chosen"]
        error = {"message": f"pairs.0.chosen: {answer} is too long", "param": "pairs.0.chosen", "code": "", "type": ""}
        return httpx.Response(status, json={"error": error})

    client, _ = asking(refused)
    found = annotate([{"prompt": "q", "chosen": f"a{i}", "rejected": "b"} for i in range(n)], client, progress=False)
    assert [(row["margin"], row[ERROR]) for row in found] == [(None, f"chosen: a{i} is too long") for i in range(n)]


def test_a_service_that_refuses_everything_is_no_fault_of_the_rows():
    error = {"message": "no such head", "param": "head", "code": "invalid_field", "type": ""}
    client, _ = asking(lambda _: httpx.Response(422, json={"error": error}))
    with pytest.raises(InvalidField, match="no such head"):
        annotate(ROWS, client, progress=False)


def test_a_list_gives_a_list_and_is_not_changed(client):
    found = annotate(ROWS, client, progress=False)
    assert [{name: row[name] for name in ROWS[0]} for row in found] == ROWS
    assert set(found[0]) == {*ROWS[0], *COLUMNS, ERROR} and "margin" not in ROWS[0]
    checked({name: [row[name] for row in found] for name in (*COLUMNS, ERROR)})


def test_a_pandas_frame_gives_a_frame_with_its_index(client):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(ROWS, index=[10, 20, 30, 40, 50])
    found = annotate(frame, client, progress=False)
    assert list(found.index) == list(frame.index) and list(found.columns)[:4] == list(frame.columns)
    assert str(found["margin"].dtype) == "float64" and str(found["label_agrees"].dtype) == "boolean"
    checked({name: [None if pd.isna(value) else value for value in found[name]] for name in (*COLUMNS, ERROR)})


def turns(answer, **more):
    return [{"role": "user", "content": "q", **more}, {"role": "assistant", "content": answer, **more}]


NAN = float("nan")
PAIR = {"prompt": "q", "chosen": "two words", "rejected": "one"}
PKU = {"prompt": "q", "response_0": "one", "response_1": "two words", "better_response_id": 1}


@pytest.mark.parametrize(
    ("row", "changed"),
    [
        ({"chosen": turns("two words"), "rejected": turns("one")}, {}),
        ({"prompt": turns("")[:1], "chosen": turns("two words")[1:], "rejected": turns("one")[1:]}, {}),
        ({"chosen": turns("two words"), "rejected": turns("one")}, {"chosen": turns("two words", name=NAN)}),
        ({"chosen": turns("two words"), "rejected": turns("one")}, {"rejected": turns("one", tool_calls=NAN)}),
        (PAIR, {"system": NAN}),
        (PAIR, {"system": None, "tools": "NA"}),
        (PAIR, {"tools": "NaT", "images": NAN}),
        ({"instruction": "q", "chosen": "two words", "rejected": "one"}, {"input": NAN}),
        (PKU, {"safer_response_id": NAN}),
    ],
)
@pytest.mark.parametrize("arrays", [False, True])
def test_what_pandas_writes_for_nothing_and_its_arrays_are_read_as_a_list_is(client, row, changed, arrays):
    pd, np = pytest.importorskip("pandas"), pytest.importorskip("numpy")
    nothing = {"NA": pd.NA, "NaT": pd.NaT}

    def cell(value):
        if isinstance(value, list):
            return np.array(value, dtype=object) if arrays else value
        return nothing.get(value, value) if isinstance(value, str) else value

    frame = pd.DataFrame({name: [cell(value)] * 2 for name, value in (row | changed).items()}, dtype=object)
    before = frame.copy()
    found, expected = annotate(frame, client, progress=False), annotate([row] * 2, client, progress=False)
    assert found[ERROR].tolist() == [None] * 2
    assert found["margin"].tolist() == [one["margin"] for one in expected] == [1.0, 1.0]
    for name in before:
        assert all(ours is theirs for ours, theirs in zip(found[name], before[name], strict=True))


def test_a_dataset_as_a_pandas_frame_has_the_margins_of_the_dataset(client):
    datasets = pytest.importorskip("datasets")
    rows = [{"chosen": turns("two words"), "rejected": turns("one"), "system": system} for system in ("be good", None)]
    found = annotate(datasets.Dataset.from_list(rows).to_pandas(), client, progress=False)
    assert found["margin"].tolist() == [1.0, 1.0]


def test_a_polars_frame_gives_a_frame(client):
    pl = pytest.importorskip("polars")
    found = annotate(pl.DataFrame(ROWS), client, prefix="x_", progress=False)
    assert isinstance(found, pl.DataFrame) and found["id"].to_list() == [0, 1, 2, 3, 4]
    checked({name: found["x_" + name].to_list() for name in (*COLUMNS, ERROR)})


def test_a_dataset_gives_a_dataset_and_a_dict_of_splits_one(client):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    checked({name: list(annotate(data, client, progress=False)[name]) for name in (*COLUMNS, ERROR)})
    both = annotate(datasets.DatasetDict(train=data, test=data.select([0])), client, progress=False)
    assert isinstance(both, datasets.DatasetDict) and list(both["test"]["margin"]) == [2.0]


def test_columns_can_be_named_and_none_is_overwritten(client):
    rows = [{"question": "q", "good": "two words", "poor": "one"}]
    names = {"prompt": "question", "chosen": "good", "rejected": "poor"}
    found = annotate(rows, client, columns=names, progress=False)
    assert found[0]["margin"] == 1.0
    with pytest.raises(DataError, match="margin"):
        annotate(found, client, columns=names, progress=False)
    with pytest.raises(DataError, match="no layout"):
        annotate([{"text": "a"}], client, progress=False)
    assert annotate([], client) == []


@pytest.mark.parametrize("data", ["rows.jsonl", 7, object()])
def test_data_of_another_kind_are_refused_by_name(client, data):
    with pytest.raises(TypeError, match=type(data).__name__):
        annotate(data, client)


@pytest.mark.parametrize("kind", ["IterableDataset", "IterableDatasetDict", "a dict with one", "Series", "LazyFrame"])
def test_what_is_nearly_of_a_known_kind_is_refused_before_anything_is_asked(kind):
    def stream():
        return pytest.importorskip("datasets").Dataset.from_list(ROWS).to_iterable_dataset()

    data = {
        "IterableDataset": stream,
        "IterableDatasetDict": lambda: pytest.importorskip("datasets").IterableDatasetDict(train=stream()),
        "a dict with one": lambda: {"train": ROWS, "test": stream()},
        "Series": lambda: pytest.importorskip("pandas").Series(ROWS),
        "LazyFrame": lambda: pytest.importorskip("polars").DataFrame(ROWS).lazy(),
    }[kind]()
    client, asked = asking(answered)
    said = rf"not {kind}$" if kind in ("Series", "LazyFrame") else r"not IterableDataset: give list\(data\.take\(n\)\)"
    with pytest.raises(TypeError, match=said):
        annotate(data, client, progress=False)
    assert not asked


def test_rows_that_are_no_dicts_are_refused_by_their_place(client):
    with pytest.raises(TypeError, match=r"data\.1 is of type str"):
        annotate([ROWS[0], "text"], client)


def test_an_answer_is_a_frame():
    pd = pytest.importorskip("pandas")
    margins = [Margin(margin=1.0, bin=0.5), Margin(error=ItemError("too long"))]
    frame = MarginAnswer(model="m", policy_version="base", head=Head("l", "legend", 1), margins=margins).to_pandas()
    assert (
        pd.isna(frame["error"][0])
        and frame["error"][1] == "too long"
        and frame["margin"][0] == 1.0
        and pd.isna(frame["margin"][1])
    )
