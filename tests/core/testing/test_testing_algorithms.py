"""Our own algorithms keep the contract that anybody's must."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf import registry
from rlhf.testing import AlgorithmContract, AlgorithmNumbers

OPTIONS: dict[str, dict[str, Any]] = {
    # On the kit's task a penalty for responses that don't end teaches to end them, not to write good letters.
    "ppo": {"missing_eos": "none"},
}
EXCEPT: dict[str, tuple[str, ...]] = {
    # What a step is worth after its last token is read where the next token begins, which no step ends at.
    "prm": ("test_masked_tokens_have_no_gradient",),
}
RUN_HERE = ("ppo", "dpo")
"""Whose runs are in the default suite, one of each sort; a few are in the matrix, and all in `nox -s kit`."""
NAMES = sorted(offer.name for offer in registry.loaded().offers_of("algo") if offer.distribution == "rlhf-kit")


def _contract(name: str, base: type) -> type:
    title = "".join(part.capitalize() for part in name.replace("+", "-plus").split("-"))
    told = {"options": OPTIONS.get(name, {}), "__module__": __name__, **dict.fromkeys(EXCEPT.get(name, ()))}
    return type(f"Test{title}", (base,), {"name": name, **told})


for _name in NAMES:
    _made = _contract(_name, AlgorithmContract if _name in RUN_HERE else AlgorithmNumbers)
    globals()[_made.__name__] = _made


def test_all_of_them_are_held_to_it() -> None:
    assert len(NAMES) >= 28
    assert len(REST) == 3
    assert {made.name for made in globals().values() if isinstance(made, type) and made.__name__ != "AlgorithmNumbers"
            and issubclass(made, AlgorithmNumbers) and made.name} == set(NAMES)  # fmt: skip


OTHERS = [name for name in NAMES if name not in RUN_HERE]
FEW = ("dapo", "ilql", "kto")
"""Of the others, whose runs are in the matrix: sampled in rounds, values a token, marked completions."""
LEARNS = "test_it_learns"
IN_THE_MATRIX = (LEARNS, "test_a_run_that_is_stopped_and_resumed_is_the_same")
NOT_SHOWN = ("distill", "distill-offline", "ilql")
"""The kit's teacher is what the policy starts as; and 16 steps are too few for values to be learnt from."""
REST = [name for name in vars(AlgorithmContract.__mro__[1]) if name.startswith("test_") and name not in IN_THE_MATRIX]


@pytest.mark.parametrize("test", IN_THE_MATRIX)
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.matrix if x in FEW else pytest.mark.matrix_full) for x in OTHERS]
)
def test_the_others_learn_and_resume(name: str, test: str, rlhf_kit: Any) -> None:
    if test == LEARNS and name in NOT_SHOWN:
        pytest.skip("the kit's task is too short for it, or its teacher too like it")
    getattr(_contract(name, AlgorithmContract)(), test)(rlhf_kit)


@pytest.mark.matrix_full
@pytest.mark.parametrize("test", REST)
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_runs_of_the_others(name: str, test: str, rlhf_kit: Any) -> None:
    getattr(_contract(name, AlgorithmContract)(), test)(rlhf_kit)
