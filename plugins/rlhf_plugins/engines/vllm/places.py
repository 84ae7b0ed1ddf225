"""Where the vLLM of a run is: in this process, in one beside it, or wherever a server was started."""

from __future__ import annotations

from typing import Any

from rlhf.api import Context
from rlhf_plugins.engines.vllm import wire
from rlhf_plugins.engines.vllm.beside import Beside
from rlhf_plugins.engines.vllm.failover import Absent, Failover, Shared
from rlhf_plugins.engines.vllm.remote import Deadlines, Server
from rlhf_plugins.engines.vllm.sampler import Sampler, Settings
from rlhf_plugins.engines.vllm.secret import token_from
from rlhf_plugins.engines.vllm.ways import carrier_of


def sampler_at(config: Any, settings: Settings, context: Context) -> Sampler:
    """A vLLM at the place that the options name. Beside, each rank has one of its own, as it has inside; a server is
    one for all ranks, and rank 0 speaks to it.

    Raises:
        RequestError: it can't be started so, or isn't there.
        EngineLost: it didn't start.
    """
    if config.place == "inside":
        from rlhf_plugins.engines.vllm.inside import InProcess

        return InProcess(settings)
    deadlines = Deadlines(config.start_timeout, config.load_timeout, config.sample_timeout, config.sample_pace)
    world = context.world
    way = carrier_of(context.plan, config)
    assert way is not None
    carried = {"carrier": way.name, "device": context.device, "only": config.carrier != "auto"}

    def told(engine: Server, name: str) -> Server:
        if engine.why_host:
            context.say(f"{name}: {engine.why_host}; weights go by way of the host instead ({engine.carrier})")
        return engine

    if config.place == "beside":

        def beside(again: bool) -> Sampler:
            name = f"the vLLM beside rank {world.rank}" if world.size > 1 else "the vLLM beside"
            return told(Beside(settings, deadlines, name=name, again=again, **carried), name)

        return Failover(beside, world, config.restarts, context.say)
    token = token_from(config.token_file) if world.rank == 0 else ""
    arguments = {name: value for name, value in settings.arguments.items() if name in wire.OPENABLE}

    def server(again: bool) -> Sampler:
        if world.rank:
            return Absent()
        return told(Server(config.url, token, arguments, deadlines, again=again, **carried), "the vLLM server")

    return Shared(Failover(server, world, config.restarts, context.say), world)
