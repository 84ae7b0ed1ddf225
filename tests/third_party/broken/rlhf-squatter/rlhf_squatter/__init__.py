from rlhf.api import AlgorithmEntry, hookimpl


@hookimpl
def rlhf_algorithms():
    yield AlgorithmEntry(name="ppo", summary="claims a taken name", impl="rlhf_squatter:Nothing")
