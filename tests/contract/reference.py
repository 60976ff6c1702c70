"""The reference pages of the documentation, written from the code: ``make contract`` writes them into
``docs/reference``, and a test compares them with what is there.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/reference"
TAGS = ["scoring", "openai", "verdicts", "bulk", "heads", "policy", "about", "health", "compatibility"]
"""In the order in which somebody new wants to know of them."""
NOTE = "<!-- Written by `make contract` from the code; changes are made there. -->\n"


def settings() -> str:
    """Every ``INWARD_*`` setting."""
    from inward.settings import Settings

    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, frozenset(), ()) else f"`{json.dumps(_plain(field.default))}`"
        rows.append([f"`INWARD_{name.upper()}`", f"`--{name.replace('_', '-')}`", default, field.description or ""])
    return _page(
        "Settings",
        "Each setting is an environment variable, an option of `inward serve`, `api` and `worker`, and a line of the "
        "YAML file that `--config` names ([its schema](settings.schema.json)); the option goes before the variable, "
        "the variable before the file. `inward info` prints what they come to. A variable `INWARD_…` that is no "
        "setting is named at the start, with the one that was probably meant.",
        _table(["variable", "option", "default", "what it does"], rows),
    )


def settings_schema() -> str:
    """The JSON Schema of the file of ``--config``, for editors and for checks before a rollout."""
    from inward.settings import Settings

    schema = Settings.model_json_schema() | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of Inward",
        "description": "The file of --config: every setting by its name.",
        "additionalProperties": False,
    }
    del schema["properties"]["config"]
    return json.dumps(schema, indent=2) + "\n"


def routes() -> str:
    """Every route, its fields and its answers, from the OpenAPI document."""
    document = json.loads((ROOT / "clients/openapi.json").read_text(encoding="utf-8"))
    tags: dict[str, list[str]] = {}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            tags.setdefault(operation["tags"][0], []).append(_route(method, path, operation, document))
    schemas = document["components"]["schemas"]
    return _page(
        "Routes",
        "The same as a document for machines: `GET /openapi.json`, or `clients/openapi.json`. Unknown fields are "
        "errors, except on the routes of other projects' clients. [Errors](errors.md) have a page of their own.",
        *(f"## {tag.capitalize()}\n\n" + "\n".join(tags[tag]) for tag in sorted(tags, key=TAGS.index)),
        "## Objects\n",
        *(_schema(name, schema) for name, schema in schemas.items()),
    )


def command_line() -> str:
    """Every command with its options; settings are on their own page."""
    from inward.commands import parser
    from inward_trainer import __main__ as trainer

    tops = {"inward": parser.command_line(), "inward-train": trainer.parser()}
    parts = [_command(f"{top} {name}", one, said) for top in tops for name, one, said in _commands(tops[top])]
    return _page(
        "Command line",
        "`inward COMMAND --help` says the same. Options that are [settings](settings.md) are only named here. "
        "`inward completion bash` (or `zsh`, `tcsh`) prints what a shell needs to complete all of it.",
        *parts,
    )


def metrics() -> str:
    """Every Prometheus series of the service and of the trainer."""
    from inward import metrics as service
    from inward_trainer import metrics as trainer

    header = ["series", "type", "labels", "what it is"]
    return _page(
        "Metrics",
        "Each process has its own `/metrics`. Beside these there are Python's and the process's own series "
        "(`python_*`, "
        "`process_*`).",
        "## The service\n\n" + _table(header, _series(service.REGISTRY)),
        "## The trainer\n\n`inward-train cdpo --metrics-port PORT` serves them.\n\n"
        + _table(header, _series(trainer.REGISTRY)),
    )


def errors() -> str:
    """Every error that an answer, or the end of a command, may name."""
    from inward import errors as module

    said = dict(re.findall(r"^[│ ]*[├└]── (\w+) +\S+ +(.+)$", module.__doc__ or "", re.MULTILINE))
    rows = []
    for error in module.tree()[1:]:
        status = "—" if issubclass(error, module.SetupError) else str(error.status)
        rows.append([status, f"`{error.code}`", f"`{error.type}`", said[error.__name__]])
    return _page(
        "Errors",
        'One shape everywhere: `{"error": {"message", "type", "param", "code"}}`; `param` is the path of the field to '
        "blame, such as `pairs.3.chosen`. Routes of other projects' clients use those projects' shapes. Errors without "
        "a status end a command with exit status 2, on one line.",
        _table(["status", "code", "type", "when"], rows),
    )


PAGES: Mapping[str, Callable[[], str]] = {
    "settings.md": settings, "settings.schema.json": settings_schema, "routes.md": routes,
    "cli.md": command_line, "metrics.md": metrics, "errors.md": errors,
}  # fmt: skip


def _page(title: str, introduction: str, *parts: str) -> str:
    return "\n".join([f"# {title}\n", NOTE, introduction, "", *(part.rstrip() + "\n" for part in parts)])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | dict | list) else str(value)


def _route(method: str, path: str, operation: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    lines = [f"### `{method.upper()} {path}`\n", f"{operation['summary']}. {operation.get('description', '')}\n"]
    asked = [
        [f"`{p['name']}`", _type(p["schema"]), "in the " + p["in"], p.get("description", "")]
        for p in operation.get("parameters", [])
    ]
    if asked:
        lines.append(_table(["parameter", "type", "", "what it is"], asked))
    for content in (operation.get("requestBody", {}).get("content") or {}).values():
        lines.append(f"Body: {_type(content.get('schema', {}))}.")
    for status, answer in operation["responses"].items():
        if status.startswith("2"):
            shapes = [_type(content.get("schema", {})) for content in (answer.get("content") or {}).values()]
            lines.append(f"Answer {status}: {' or '.join(filter(None, shapes)) or answer['description']}.")
    wrong = [status for status in operation["responses"] if not status.startswith("2")]
    if wrong:
        lines.append(f"Errors: {', '.join(wrong)}.")
    return "\n".join(f"{line}\n" if not line.endswith("\n") else line for line in lines)


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = [
        [f"`{field}`" + ("" if field in required else "?"), _type(about), about.get("description", "")]
        for field, about in schema.get("properties", {}).items()
    ]
    table = _table(["field (? is optional)", "type", "what it is"], rows) if rows else f"{_type(schema)}\n"
    return f"### {name}\n\n{schema.get('description', '')}\n\n{table}"


def _type(schema: Mapping[str, Any]) -> str:
    """In a few words, with links to the objects."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(option) for option in options))
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {})) or 'anything'}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties']) or 'anything'}"
    return {"null": "null", None: ""}.get(schema.get("type"), str(schema.get("type", "")))


def _commands(top: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """Each command that does something, with those below a command after it."""
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            purposes = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, parser in action.choices.items():
                yield name, parser, purposes.get(name, "")
                yield from ((f"{name} {below}", one, purpose) for below, one, purpose in _commands(parser))


def _command(name: str, parser: argparse.ArgumentParser, purpose: str) -> str:
    from inward.settings import Settings

    rows, shared = [], []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        if action.dest in Settings.model_fields and name.startswith("inward "):
            shared.append(f"`{action.option_strings[0]}`")
            continue
        named = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar or action.dest}`"
        choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
        said = (action.help or "") % {"default": action.default, "prog": name}
        rows.append([named, said + choices])
    text = parser.description or purpose
    lines = [f"## `{name}`\n", "\n".join(line.strip() for line in text.strip().splitlines()) + "\n"]
    if rows:
        lines.append(_table(["option", "what it does"], rows))
    if shared:
        every = len(shared) == len(Settings.model_fields)
        lines.append(f"Settings: {'all' if every else ', '.join(shared)}.\n")
    return "\n".join(lines)


def _series(registry: CollectorRegistry) -> Iterator[list[str]]:
    for collector in registry._collector_to_names:
        if isinstance(collector, MetricWrapperBase):
            labels = ", ".join(f"`{label}`" for label in collector._labelnames)
            name = collector._name + "_total" * (collector._type == "counter")
            yield [f"`{name}`", collector._type, labels, collector._documentation]


def write(folder: Path = FOLDER) -> None:
    """All pages."""
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    write()
