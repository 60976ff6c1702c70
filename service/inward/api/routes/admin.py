"""Heads, health and what the service says of itself."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Response

from inward import metrics
from inward.api.answers import plain
from inward.api.auth import needs
from inward.api.body import JsonRoute
from inward.api.errors import RESPONSES, only, told
from inward.api.services import FromApp, Services, SleepControl
from inward.errors import Conflict, EngineDead, InvalidField, Unavailable
from inward.prompts import Texts
from inward.wire import ActivateRequest, NamedHead, PolicyAnswer, PolicyRequest, UpdateRequest
from inward.wire.admin import HeadInfo, HeadsAnswer, Info, SleepAnswer, Status

router = APIRouter(route_class=JsonRoute)

Name = Annotated[str, Path(max_length=64, description="Name of a loaded head.")]
RESTRICTED = told({403: "The key has not the scope that this needs."})
UNREACHABLE = only(401, 503)
SLEEPLESS = UNREACHABLE | RESTRICTED | told({409: "This backbone does not sleep, or it is in another process."})
RED = told({503: "Not now; the message says why."})

PROMETHEUS: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}}


@router.get("/heads", tags=["heads"], response_model=HeadsAnswer, summary="What is loaded", responses=only(401))
async def heads(services: FromApp) -> Response:
    """All heads, as `{"heads": […]}`."""
    return plain({"heads": services.heads.listing()})


@router.get("/heads/{name}", tags=["heads"], response_model=HeadInfo, summary="One head", responses=only(401, 404, 422))
async def head(name: Name, services: FromApp) -> Response:
    """Its versions, fingerprint, calibration, and metrics at fitting."""
    return plain(services.heads.show(name))


@router.post(
    "/heads/{name}/activate",
    tags=["heads"],
    summary="Switch to a version",
    response_model=NamedHead,
    responses=RESPONSES | RESTRICTED,
    dependencies=[needs("update")],
)
async def activate(name: Name, request: ActivateRequest, services: FromApp) -> Response:
    """Every batch that begins from now on is answered by this version. The key needs the scope `update`."""
    return plain(asdict(await services.heads.activate(name, request.version)))


@router.post(
    "/heads/{name}/update",
    tags=["heads"],
    summary="One online step",
    response_model=NamedHead,
    responses=RESPONSES | RESTRICTED | told({409: "The sequence number is neither the last one nor the next."}),
    dependencies=[needs("update")],
)
async def update(name: Name, request: UpdateRequest, services: FromApp) -> Response:
    """Makes a new version, which is active at once. Sending the last sequence number again changes nothing and
    answers the same. For hybrid heads without a pool. The key needs the scope `update`.
    """
    texts: list[Texts] = []
    for i, pair in enumerate(request.pairs):
        try:
            parts = pair.parts()
        except InvalidField as error:
            raise error.at(f"pairs.{i}.{error.param}") from None
        texts.append(Texts(parts.prompt, parts.responses))
    return plain(asdict(await services.heads.update(name, request.sequence, texts, lr=request.lr)))


@router.get(
    "/policy",
    tags=["policy"],
    summary="Which policy the backbone carries",
    response_model=PolicyAnswer,
    responses=UNREACHABLE,
)
async def policy(services: FromApp) -> Response:
    """The version, those that it can be switched to, and the history."""
    return plain(await services.policies.show())


@router.post(
    "/policy",
    tags=["policy"],
    summary="Switch to an adapter",
    response_model=PolicyAnswer,
    responses=RESPONSES | RESTRICTED | told({409: "There is no folder of adapters."}),
    dependencies=[needs("admin")],
)
async def switch_policy(request: PolicyRequest, services: FromApp) -> Response:
    """Every batch that begins from now on is computed with this LoRA adapter; `base` takes it off. A request in flight
    finishes with the version that it began with, and every answer names its own. What is carried already changes
    nothing. The key needs the scope `admin`.
    """
    return plain(await services.policies.switch(request.version))


@router.post(
    "/sleep",
    tags=["policy"],
    response_model=SleepAnswer,
    summary="Lend the GPU",
    responses=SLEEPLESS,
    dependencies=[needs("admin")],
)
async def sleep(services: FromApp) -> Response:
    """For a trainer on the same GPU: vLLM's weights wait in main memory, its cache is dropped. What was begun is
    finished first; from now on requests get 503 and `/readyz` is red, until `/wake`. The key needs the scope
    `admin`.
    """
    await _sleeper(services).sleep()
    return plain({"asleep": True})


@router.post(
    "/wake",
    tags=["policy"],
    response_model=SleepAnswer,
    summary="Take the GPU back",
    responses=SLEEPLESS,
    dependencies=[needs("admin")],
)
async def wake(services: FromApp) -> Response:
    """Requests are answered again, by the same heads and policy. The key needs the scope `admin`."""
    await _sleeper(services).wake()
    return plain({"asleep": False})


def _sleeper(services: Services) -> SleepControl:
    if services.sleeper is None:
        raise Conflict("the workers have the backbone, and this replica only the queue to them: stop them instead")
    return services.sleeper


@router.get("/livez", tags=["health"], response_model=Status, summary="Is the engine alive?", responses=RED)
async def livez(services: FromApp) -> Response:
    """Red only when the engine is dead: restart the process."""
    if not services.alive():
        raise EngineDead("the engine is dead; restart the process", retry_after=10.0)
    return plain({"status": "alive"})


@router.get("/health", tags=["health"], response_model=Status, summary="The same as /readyz", responses=RED)
@router.get("/readyz", tags=["health"], response_model=Status, summary="Are requests welcome?", responses=RED)
async def readyz(services: FromApp) -> Response:
    """Red while the engine is dead, or the server is shutting down."""
    ready, reason = services.ready()
    if not ready:
        raise (Unavailable if services.alive() else EngineDead)(reason, retry_after=10.0)
    return plain({"status": reason})


@router.get("/info", tags=["about"], response_model=Info, summary="Limits, versions, model", responses=only(401))
async def info(services: FromApp) -> Response:
    """What serves here, and what one request may ask for."""
    return plain(dict(services.info()))


@router.get("/metrics", tags=["about"], summary="For Prometheus", response_class=Response, responses={200: PROMETHEUS})
async def metrics_(services: FromApp) -> Response:
    """All series, in Prometheus' text format."""
    return Response(metrics.exposition(), media_type=metrics.CONTENT_TYPE)
