"""Inward inside somebody else's ``vllm serve``: ``/margin``, ``/score`` and ``/reward`` on the engine that runs there.

vLLM finds both parts by entry points (``pyproject.toml``): ``register`` in every process of vLLM, which does nothing
unless ``VLLM_PLUGINS`` names ``inward``, and ``Endpoint`` where it then answers HTTP. Until they have something to do
nothing but this file's few names is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Namespace

    from inward.processes.standalone import Standalone
    from inward.processes.wiring import ModelFiles
    from inward.settings import Settings

NAME = "inward"
"""In ``VLLM_PLUGINS``."""
PATHS = ("/margin", "/score", "/reward")
DRAIN_S = 5.0
"""For answers that are still on their way when vLLM ends; it ends its engine without waiting for them."""


def register() -> None:
    """Where an engine's arguments are about to be resolved, sees to it that the engine can be read."""
    if NAME in os.environ.get("VLLM_PLUGINS", "").split(",") and "vllm.engine.arg_utils" in sys.modules:
        from inward.backbones.vllm import hosted

        hosted.prepare(chosen)


def chosen(model: str, revision: str | None) -> tuple[Settings, ModelFiles]:
    """The settings, by which the heads are found, and the files of the model that vLLM serves; nothing is loaded.

    Raises:
        SetupError: there are no heads, one was fitted on another model, or a setting is wrong.
    """
    from inward.backbones.fingerprint import fingerprint
    from inward.backbones.loading import name_of
    from inward.errors import SetupError
    from inward.heads import store
    from inward.heads.registry import Registry
    from inward.processes.wiring import ModelFiles, bundled_for, check_heads, heads_folder

    settings = _settings(model, revision)
    files = ModelFiles(_folder(model, revision), name_of(model), revision or "")
    identity = fingerprint(files.folder)
    if settings.heads is None:
        bundled = bundled_for(identity)
        if bundled is None:
            raise SetupError(
                f"none of the heads that come with Inward was fitted on {model} ({identity}): name a folder of heads "
                "with INWARD_HEADS, or take inward out of VLLM_PLUGINS"
            )
        settings = settings.model_copy(update={"model": bundled})
    check_heads(settings)
    heads = Registry.open(heads_folder(settings)).listing()
    if not heads:
        raise SetupError(f"there is no head in {settings.heads}: fit one with `inward fit … --out`")
    for head in heads:
        store.load(head["path"], fingerprint=identity, backbone=model)
    return settings, files


def _settings(model: str, revision: str | None) -> Settings:
    from pydantic import ValidationError

    from inward.errors import SetupError
    from inward.settings import PREFIX, Settings

    try:
        return Settings(model=model, revision=revision)
    except ValidationError as error:
        problems = (f"{PREFIX}{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors())
        raise SetupError("; ".join(problems)) from None


def _folder(model: str, revision: str | None) -> Any:
    from pathlib import Path

    from inward.backbones.loading import resolve
    from inward.errors import SetupError

    given = Path(model)
    if given.is_file() or (given.is_dir() and not any(given.glob("*.safetensors"))):
        raise SetupError(
            f"{model} holds no *.safetensors, by which heads know the model that they were fitted on; serve it with "
            "`inward serve`"
        )
    return resolve(model, revision)


class Endpoint:
    """vLLM's ``EndpointPlugin``, and the app behind its routes: the service's own, errors and keys included."""

    name = NAME
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.__name__ = NAME  # vLLM lists its routes by the names of their functions
        self._service: Standalone | None = None

    def attach_router(self, app: Any) -> None:
        """Puts our routes before vLLM's, whose ``/score`` an engine that generates can't answer."""
        from starlette.routing import Route

        app.router.routes[:0] = [Route(path, self) for path in PATHS]
        theirs = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[Any]:
            try:
                async with theirs(app) as state:
                    yield state
            finally:
                await self._close()

        app.router.lifespan_context = lifespan

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Reads the heads and tries the engine.

        Raises:
            SetupError: it can't be read, or a head does not fit.
        """
        import logging

        from inward import logs, metrics
        from inward.backbones import vllm
        from inward.processes.standalone import Standalone
        from inward.processes.wiring import equip

        config = engine_client.vllm_config.model_config
        settings, files = chosen(config.model, config.revision)
        settings = settings.model_copy(update={"api_keys": settings.api_keys | _keys(args)})
        named = settings.model_fields_set
        logs.configure_own(
            settings.log_level if "log_level" in named else "warning",
            json="log_format" in named and settings.log_format == "json",
        )
        name = _name(args, files.name)
        backbone = await vllm.host_backbone(engine_client, files.folder, name=name, revision=files.revision)
        self._service = Standalone(settings, await equip(settings, files, backbone))
        metrics.show_elsewhere()
        heads = ", ".join(f"{ref['name']} ({ref['kind']}, version {ref['version']})" for ref in self._heads())
        logging.getLogger("vllm.plugins.inward").info(
            "Inward answers %s for %s (%s) with the heads %s", ", ".join(PATHS), name, backbone.info.fingerprint, heads
        )

    def _heads(self) -> list[dict[str, Any]]:
        return self._service.registry.listing() if self._service is not None else []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request, as ASGI."""
        assert self._service is not None  # vLLM serves after init_state
        await self._service.app(scope, receive, send)

    async def _close(self) -> None:
        if self._service is not None:
            await self._service.close(DRAIN_S)


def _keys(args: Namespace) -> frozenset[Any]:
    """Those that vLLM itself lets in."""
    from pydantic import SecretStr

    given = args.api_key or [os.environ.get("VLLM_API_KEY")]
    return frozenset(SecretStr(key) for key in ([given] if isinstance(given, str) else given) if key)


def _name(args: Namespace, name: str) -> str:
    """Under which vLLM serves the model, if it was given one."""
    served = args.served_model_name
    return str(served if isinstance(served, str) else served[0]) if served else name
