"""What each kind of component implements. Imported after the plan is accepted; entry modules don't import this.

A method that raises NotImplementedError is abstract: what derives from the class has its own, or, as the message says,
needs none for what it does. It isn't marked by `abc`, since which are needed depends on that use: an algorithm that
samples has no `examples`, a policy whose roles share no base no heads for them. `rlhf.testing` calls those that are.

Every component is made as `Class(config, context)`. One that keeps anything between steps puts it in `state()`:
what isn't in there is not restored.

The modules, the kinds in each, and what those are for:

    policy       policy               loads models, turns text into tokens, scores sequences
    algorithm    algo                 what to sample, what to learn from it, the loss
    rollout      engine reward        requests to responses; responses to numbers
    training     mem optim backend    how a module is held; what steps it; ranks as one
    run          format track         what a run reads; who hears of it

Each of these modules imports only from those above it. Launchers, and what all components are, are in
`rlhf.component`, which needs no torch.
"""

from __future__ import annotations

from rlhf.component import Component, Context, Launcher, State
from rlhf.interfaces.algorithm import Algorithm, Score
from rlhf.interfaces.policy import Codec, HeadRequest, LoadSpec, Policy
from rlhf.interfaces.rollout import Engine, Failed, LogProbs, Reward, Weights
from rlhf.interfaces.run import Format, Tracker
from rlhf.interfaces.training import Backend, MemoryStrategy, OptimizerStrategy, StepResult, TrainedParameter

CLASS_OF_KIND: dict[str, type[Component]] = {
    "algo": Algorithm,
    "policy": Policy,
    "engine": Engine,
    "reward": Reward,
    "mem": MemoryStrategy,
    "optim": OptimizerStrategy,
    "backend": Backend,
    "format": Format,
    "track": Tracker,
    "launch": Launcher,
}
"""Kind -> what its implementations derive from."""

__all__ = [
    "CLASS_OF_KIND",
    "Algorithm",
    "Backend",
    "Codec",
    "Context",
    "Engine",
    "Failed",
    "Format",
    "HeadRequest",
    "LoadSpec",
    "LogProbs",
    "MemoryStrategy",
    "OptimizerStrategy",
    "Policy",
    "Reward",
    "Score",
    "State",
    "StepResult",
    "Tracker",
    "TrainedParameter",
    "Weights",
]
