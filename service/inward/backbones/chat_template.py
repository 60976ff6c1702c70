"""A model's chat template, compiled as transformers compiles it: in Jinja's sandbox, with the few functions that
templates in the field call.

A template comes with the model and is somebody else's code. The sandbox lets it change nothing and reach no attribute
that begins with an underscore.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """``{% generation %} … {% endgeneration %}``, with which a template marks what the assistant wrote; here it is text
    like any other.
    """

    tags = {"generation"}  # noqa: RUF012 (it is Jinja's)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Any) -> str:
        return str(caller())


class ChatTemplate:
    """What turns conversations into texts.

    Args:
        source: the template, or several by name, of which ``default`` is taken.
        special_tokens: which it may name.

    Raises:
        ValueError: there is none.
        jinja2.TemplateError: it is no template.
    """

    def __init__(self, source: str | Mapping[str, str] | None, special_tokens: Mapping[str, Any]) -> None:
        text = source.get("default") if isinstance(source, Mapping) else source
        if not text:
            raise ValueError("this tokenizer has no chat template (of several, none is called 'default')")
        self._template = compile_template(text)
        self._special_tokens = special_tokens

    def render(self, conversation: list[dict[str, str]], add_generation_prompt: bool, **variables: Any) -> str:
        """The conversation as text. ``variables`` are the template's, beside its own.

        Raises:
            jinja2.TemplateError: the template is damaged, or refuses the conversation.
        """
        return self._template.render(
            messages=conversation, tools=None, documents=None, add_generation_prompt=add_generation_prompt,
            **self._special_tokens, **variables,
        )  # fmt: skip


@lru_cache(maxsize=8)
def compile_template(text: str) -> Template:
    """The template ``text``, ready to render.

    Raises:
        jinja2.TemplateError: it is no template.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(text)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
