"""``inward-train paper``: options → tables → the report."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from inward.backbones.fingerprint import fingerprint
from inward_trainer.durable import write_text
from inward_trainer.errors import OptionsError
from inward_trainer.models import first_line
from inward_trainer.options import PaperOptions
from inward_trainer.paper.cells import OutOfTime
from inward_trainer.paper.experiment import Experiment
from inward_trainer.paper.language_model import reading_dtype
from inward_trainer.paper.report import devices, write_report
from inward_trainer.paper.table import Table
from inward_trainer.paper.tables import alignment, cost, judge, legend, probes, srr, topk
from inward_trainer.paper.workers import work

LOG = logging.getLogger(__name__)
TABLES: dict[str, Callable[[Experiment], Table]] = {
    "judge": judge.table,
    "alignment": alignment.table,
    "topk": topk.table,
    "probes": probes.table,
    "legend": legend.table,
    "srr": srr.table,
    "cost": cost.table,
}
ALONE = "cost"
"""Timings need the device for themselves."""
GROUPS = {"hybrid": ("alignment", "topk", "probes"), "all": tuple(TABLES), "report": ()}
MAY_DIFFER = ("seeds", "devices")
"""Between commands that go on with one another's work: all of them are written down."""


def run(options: PaperOptions) -> int:
    """Makes the tables that are not there yet, and the report of all that are. The exit status: 1 if one failed.

    Raises:
        OptionsError: no such table, model, device or data, or the folder is another run's.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that workers end, too
    try:
        return _run(options)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: PaperOptions) -> int:
    names = chosen(options.tables)
    failed = False
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if names:
        experiment = Experiment(options)
        _settle(experiment)
        if options.workers > 1 and (shared := [name for name in names if name != ALONE]):
            failed = work(options, shared) > 0
            names = [name for name in names if name == ALONE]
        for name in names:
            failed |= not _table(experiment, name)
    print(write_report(options.out, list(TABLES)), file=sys.stderr)
    return int(failed)


def chosen(tables: list[str]) -> list[str]:
    """Names of tables, in the order that they are asked for.

    Raises:
        OptionsError: there is no such table.
    """
    if unknown := [name for name in tables if name not in TABLES and name not in GROUPS]:
        raise OptionsError(f"--tables: there is no {', '.join(unknown)}; there are {', '.join([*TABLES, *GROUPS])}")
    return list(dict.fromkeys(one for name in tables for one in GROUPS.get(name, (name,))))


def _table(experiment: Experiment, name: str) -> bool:
    """Makes a table unless it is there in full; whether it is there then. One that fails leaves its reason."""
    path = experiment.options.out / f"{name}.json"
    made: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {"complete": False}
    if made["complete"]:  # with more seeds than it has, or not at all
        experiment.seeds = sorted({*made["seeds"], *experiment.options.seeds})
        if experiment.seeds == sorted(made["seeds"]):
            LOG.info("%s is there", path)
            return True
    else:
        experiment.seeds = experiment.options.seeds
    failure = experiment.options.out / f"{name}.failed"
    try:
        table = TABLES[name](experiment)
    except OutOfTime as error:
        write_text(failure, str(error))
        return True
    except Exception as error:
        LOG.exception("table %s failed", name)
        write_text(failure, f"{type(error).__name__}: {first_line(error)}")
        return False
    table.seeds = experiment.seeds
    write_text(path, json.dumps(table.to_json(), allow_nan=False))
    failure.unlink(missing_ok=True)
    return True


def _settle(experiment: Experiment) -> None:
    """Writes down what is made here: what another setting has left in the folder would be taken for this one's.

    Raises:
        OptionsError: that is there.
    """
    path, setting = experiment.options.out / "setting.json", _setting(experiment)
    earlier = json.loads(path.read_text("utf-8")) if path.is_file() else setting
    if other := [name for name, value in setting.items() if name not in MAY_DIFFER and earlier.get(name) != value]:
        raise OptionsError(
            f"--out {experiment.options.out} has a run with another {', '.join(other)}: give the options that it has "
            "(setting.json), or another folder"
        )
    before = {"seeds": earlier["seeds"], "devices": devices(earlier)}
    for name in MAY_DIFFER:
        setting[name] = list(dict.fromkeys([*before[name], *setting[name]]))
    write_text(path, json.dumps(setting, indent=1))


def _setting(experiment: Experiment) -> dict[str, Any]:
    options, device = experiment.options, experiment.device.type
    return {
        "model": Path(options.model).name,
        "weights": fingerprint(experiment.folder),
        "devices": [f"{device}, {torch.cuda.get_device_name() if device == 'cuda' else 'no GPU'}"],
        "precision": str(reading_dtype(experiment.device)).removeprefix("torch."),
        "seeds": options.seeds,
        "quick": options.quick,
        "scale": experiment.scale,
        "learning rate": options.learning_rate,
        "data": experiment.data.told(),
        "files": experiment.data.digest,
        "sizes": asdict(experiment.sizes),
    }
