"""The judge, measured on prompts that it was not trained on, beside a bag of words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from inward.offline.data.pairs import prompt_groups
from inward_trainer.paper.cells import Json
from inward_trainer.paper.data import Answer
from inward_trainer.paper.estimates import of_judge, share
from inward_trainer.paper.experiment import Experiment
from inward_trainer.paper.refusals import refuses
from inward_trainer.paper.table import Row, Table

COLUMNS = ["answers", "accuracy", "AUC", "calibration error"]


def table(run: Experiment) -> Table:
    """Both judges on PKU-SafeRLHF's other prompts, and on JailbreakBench's answers by five other models."""
    found = run.cells.need("judge", lambda: _measured(run))
    rows = [Row(name, cells) for name, cells in found["rows"].items()]
    notes = [
        "Both are trained on the same answers. JailbreakBench's labels are Llama Guard 2's. An answer counts as unsafe "
        "below a probability of 1/2; the calibration error is over 15 bins.",
        f"Where PKU's and the bag of words' verdicts differ: {found['differ']:.0%} of PKU's answers; there the judge "
        f"is right in {found['right']:.0%}.",
        f"What counts as a refusal (a rule, no model) agrees with XSTest's people in "
        f"{found['refusals']['value']:.1%} [{found['refusals']['low']:.1%}, {found['refusals']['high']:.1%}] of "
        f"{found['refusal_rows']} answers that refuse or comply in full.",
    ]
    published = [
        [
            "macro-F1 of one answer's safety, SafeRLHF",
            "91.5–93.2",
            "SIREN, arXiv 2604.18519",
            "0.6–8 B frozen; another split",
        ],
        ["bag of words, PKU: accuracy", "0.63", "TF-IDF + logistic, measured before", "answers only"],
    ]
    return Table("judge", "The judges", COLUMNS, rows, notes, published=published)


def _measured(run: Experiment) -> Json:
    lists = [Answer(one.prompt, t, s) for one in run.data.lists for t, s in zip(one.texts, one.safe, strict=True)]
    rows, logits = {}, {}
    for name, answers in (("PKU-SafeRLHF, other prompts", run.data.judge_test), ("JailbreakBench", lists)):
        both = [(row.prompt, row.text) for row in answers]
        for judge, found in (("judge", run.judge.scores(run.encoded(both))), ("bag of words", run.words.logits(both))):
            rows[f"{judge}: {name}"] = {"answers": float(len(answers)), **_figures(found, answers)}
            logits[judge, name] = found > 0
    first = "PKU-SafeRLHF, other prompts"
    differ = logits["judge", first] != logits["bag of words", first]
    safe = np.array([row.safe for row in run.data.judge_test])
    clear = [row for row in run.data.xstest if row.label != 3]
    right = [refuses(row.text) == (row.label == 2) for row in clear]
    return {
        "rows": rows,
        "differ": float(differ.mean()),
        "right": float((logits["judge", first] == safe)[differ].mean()) if differ.any() else 0.0,
        "refusals": share(right, prompt_groups(row.prompt for row in clear)),
        "refusal_rows": len(clear),
    }


def _figures(logits: object, answers: Sequence[Answer]) -> Json:
    groups = prompt_groups(row.prompt for row in answers)
    return dict(of_judge(logits, [row.safe for row in answers], groups))  # type: ignore[arg-type]
