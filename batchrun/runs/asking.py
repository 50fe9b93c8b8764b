"""What is asked of every row, and the endpoint that is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from batchrun import process
from batchrun.chat import AnswerSchema, PromptSettings
from batchrun.config import MAX_CONCURRENCY, RunConfig
from batchrun.endpoint import ChatEndpoint
from batchrun.errors import UsageError
from batchrun.mock import Knobs, MockServer
from batchrun.processes import Crew, Here, OnNodes, Terms, check_ray, cluster
from batchrun.providers import DEFAULT_MODEL, MOCK, full_url, provider_of
from batchrun.sending import EarlyEnd, OpenEndpoint


def prompt_settings(config: RunConfig) -> PromptSettings:
    """What the user asks of every row, with this endpoint's habits."""
    return PromptSettings(
        model=model_of(config),
        model_replaces=config.model_replaces,
        system=config.system,
        params=config.params,
        params_replacing=config.params_replacing,
        stream=config.stream,
        stream_usage=_asks_usage(config),
        prompt_column=config.prompt_column,
        body_columns=config.body_columns,
        prompt=config.prompt,
        messages=config.messages,
        image=config.image,
        schema_digest=schema.digest if (schema := answer_schema(config)) is not None else b"",
    )


def answer_schema(config: RunConfig) -> AnswerSchema | None:
    """The schema that answers have to fit; UsageError for what is none."""
    return None if config.schema is None else AnswerSchema(config.schema)


def model_of(config: RunConfig) -> str | None:
    return config.endpoint.default_model if config.model is None else config.model


def _asks_usage(config: RunConfig) -> bool:
    """Whether a stream of this endpoint tells its usage only when asked."""
    provider = provider_of(config.endpoint.url)
    is_default = config.endpoint.default_model == DEFAULT_MODEL
    return not is_default and (provider is None or provider.name != "mistral")


def check_endpoint(config: RunConfig) -> None:
    """Synthetic answers must not pass for real ones: only ``mock`` asks the endpoint inside."""
    if config.endpoint == MOCK and not config.mock:
        raise UsageError("no endpoint: endpoint= names one, mock=True the one inside")


def check_engine(config: RunConfig) -> None:
    """UsageError where the processes that should send cannot be had here."""
    if config.engine == "ray":
        check_ray()


@asynccontextmanager
async def endpoint_to_send(config: RunConfig, end: EarlyEnd) -> AsyncIterator[OpenEndpoint]:
    """Where requests go, in this process or in several, open until the end of the block.

    ``end`` ends the waiting for processes, and is told when there will be none any more.
    """
    async with AsyncExitStack() as stack:
        if config.engine == "ray":
            rays = await stack.enter_async_context(cluster(config.ray_address, end.check))
            processes = config.processes or rays.nodes
            terms = await stack.enter_async_context(_terms(config, processes))
            on_nodes = OnNodes(rays, terms)
            endpoint: Crew | ChatEndpoint = Crew(terms, processes, on_nodes, end.check, end.tell)
        else:
            processes = config.processes or 1
            terms = await stack.enter_async_context(_terms(config, processes))
            endpoint = (
                Crew(terms, processes, Here(terms), end.check, end.tell)
                if processes > 1
                else terms.endpoint_here()
            )
        yield await stack.enter_async_context(endpoint)


@asynccontextmanager
async def _terms(config: RunConfig, processes: int) -> AsyncIterator[Terms]:
    """What one has to know to send; the stand-in inside, if it is that, runs for the block."""
    if config.endpoint == MOCK:
        async with MockServer(Knobs()) as server:
            inside = replace(MOCK, url=full_url(server.url, MOCK.path))
            inner = replace(config, endpoint=inside, headers=())
            # The other ends of its connections are in this process too.
            yield _terms_of(inner, processes, sockets_each=1 + processes)
    else:
        yield _terms_of(config, processes, proxied=True)


def _terms_of(
    config: RunConfig, processes: int, *, proxied: bool = False, sockets_each: int = 1
) -> Terms:
    room = -(-config.concurrency // processes) if config.concurrency else MAX_CONCURRENCY
    if config.engine == "local":
        room = process.room_for_sockets(room * sockets_each) // sockets_each
    return Terms(
        config.endpoint,
        config.headers,
        timeout_s=config.timeout_s,
        connect_timeout_s=config.connect_timeout_s,
        proxied=proxied,
        room=room,
    )


def wanted_room(config: RunConfig) -> int:
    """How many requests may be in flight, if processes may open as many connections."""
    return config.concurrency or MAX_CONCURRENCY * (config.processes or 1)


async def models(config: RunConfig) -> list[str]:
    """The model names that the endpoint offers to this key."""
    async with _terms(config, 1) as terms, terms.endpoint_here() as endpoint:
        return await endpoint.models()
