"""The report page: every table that is there, as HTML and as Markdown. A row without figures says why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from inward_trainer.durable import write_text
from inward_trainer.paper import svg
from inward_trainer.paper.table import Row, Table

HEADING = "The papers' tables"
OPENING = (
    "The tables of the papers that Inward is made of, measured anew. Intervals are 95 %, bootstrapped over prompts. "
    "What the papers report stands beside, as theirs: other models, other data, other judges."
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: left; vertical-align: top }
td:first-child { min-width: 15rem }
th { background: #f5f5f5; position: sticky; top: 0 } small { color: #777; white-space: nowrap } .empty { color: #999 }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd } th { background: #262626 } th, td { border-color: #3a3a3a }
}
"""


def write_report(out: Path, names: Sequence[str]) -> str:
    """Writes ``OUT/report.html`` and ``OUT/report.md``; says where."""
    path = out / "setting.json"
    setting: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    found: list[tuple[str, Table | str]] = [(name, _read(out, name)) for name in names]
    write_text(out / "report.md", markdown(setting, found))
    write_text(out / "report.html", page(setting, found))
    return f"the report: {out / 'report.html'}, {out / 'report.md'}"


def markdown(setting: dict[str, Any], found: Sequence[tuple[str, Table | str]]) -> str:
    """For reading as text; without the figures."""
    parts = [f"# {HEADING}", OPENING, *_setting(setting)]
    for name, table in found:
        if isinstance(table, str):
            parts += [f"## {name}", f"No figures: {table}"]
            continue
        parts += [f"## {table.title}", _grid(["", *table.columns], [_cells(row, table.columns) for row in table.rows])]
        parts += [f"- {note}" for note in _notes(table, setting)]
        if table.published:
            parts += ["Published, not ours:", _grid(["what", "figure", "from", "why ours may differ"], table.published)]
    return "\n\n".join(parts) + "\n"


def page(setting: dict[str, Any], found: Sequence[tuple[str, Table | str]]) -> str:
    """One file, nothing fetched from elsewhere."""
    parts = [f"<h1>{HEADING}</h1><p>{escape(OPENING)}</p>", _list(_setting(setting))]
    for name, table in found:
        if isinstance(table, str):
            parts.append(f"<h2>{escape(name)}</h2><p class='empty'>No figures: {escape(table)}</p>")
            continue
        rows = [_cells(row, table.columns) for row in table.rows]
        parts += [
            f"<h2>{escape(table.title)}</h2>",
            _html_grid(["", *table.columns], rows),
            _list(_notes(table, setting)),
        ]
        parts += [svg.draw(chart) for chart in table.charts]
        if table.published:
            heads = ["what", "figure", "from", "why ours may differ"]
            parts.append("<h3>Published, not ours</h3>" + _html_grid(heads, table.published))
    body = "\n".join(parts)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{HEADING}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style><body>{body}</body></html>\n"
    )


def told(value: Any) -> str:
    """A cell in words: a share or number, its interval, its spread."""
    if value is None or value == "":
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return _number(float(value))
    spread = f" ±{_number(value['spread'])}" if "spread" in value else ""
    return f"{_number(value['value'])}{spread} [{_number(value['low'])}, {_number(value['high'])}]"


def _number(x: float) -> str:
    if abs(x) >= 1e5:
        return f"{x:.2e}"
    return f"{x:.0f}" if x == int(x) and abs(x) >= 10 else f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"


def _read(out: Path, name: str) -> Table | str:
    path, failure = out / f"{name}.json", out / f"{name}.failed"
    if path.is_file():
        return Table.from_json(json.loads(path.read_text("utf-8")))
    return failure.read_text("utf-8") if failure.is_file() else f"not made yet: --tables {name}"


def _setting(setting: dict[str, Any]) -> list[str]:
    if not setting:
        return []
    precision = f", in {setting['precision']}" if "precision" in setting else ""
    quick = " A quick run: its numbers say nothing." if setting["quick"] else ""
    first = (
        f"Model {setting['model']}, on {'; '.join(devices(setting))}{precision}; "
        f"seeds {', '.join(map(str, setting['seeds']))}; learning rate {setting['learning rate']:g}; "
        f"scale {setting['scale']:g}.{quick}"
    )
    return [first, *setting["data"]]


def devices(setting: dict[str, Any]) -> list[str]:
    """Where a folder's figures were made; former versions wrote one."""
    return list(setting.get("devices") or [setting.get("device", "an unknown device")])


def _notes(table: Table, setting: dict[str, Any]) -> list[str]:
    fewer = table.seeds and sorted(table.seeds) != sorted(setting.get("seeds", table.seeds))
    return [*table.notes, *([f"Of seeds {', '.join(map(str, table.seeds))} only."] if fewer else ())]


def _cells(row: Row, columns: Sequence[str]) -> list[str]:
    cells = [told(row.cells.get(column)) for column in columns]
    return [f"{row.name} ({row.reason})" if row.reason else row.name, *cells]


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _html_grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{_shown(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


def _shown(cell: str) -> str:
    value, bracket, interval = escape(cell).partition(" [")
    return f"{value} <small>[{interval}</small>" if bracket and interval.endswith("]") else escape(cell)


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""
