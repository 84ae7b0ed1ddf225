"""Memory strategies: the precision of weights and matrix products, quantised weights, LoRA adapters, gradient
checkpointing."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import attrs

from rlhf.api import MemoryEntry, hookimpl, option
from rlhf_plugins.memory.rules import bitsandbytes_from, only_trained, under_adapters, whole_blocks

# bitsandbytes, which PEFT imports wherever it is installed, warns of a kernel that it lacks and that is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

BITSANDBYTES = {"bitsandbytes": "pip install 'rlhf-kit[quant]'"}


@attrs.frozen(kw_only=True)
class LoraConfig:
    rank: int = option(16, help="of the update B A to each adapted matrix", source="r in Hu et al. 2021", ge=1)
    alpha: int = option(32, help="the update is scaled by alpha / rank", source="alpha in Hu et al. 2021", ge=1)
    dropout: float = option(0.0, help="of the adapters' inputs, in the loss's forward only; 0 for RL", ge=0, lt=1)
    targets: tuple[str, ...] = option(
        (),
        help="names of the linear modules to adapt, such as q_proj,v_proj, or all-linear; left out, PEFT's choice for "
        "the architecture where it has one, else all-linear",
    )
    rslora: bool = option(
        False, help="scale by alpha / sqrt(rank), for high ranks", source="Kalajdzievski 2023, arXiv:2312.03732"
    )
    dora: bool = option(
        False, help="train each matrix's magnitude apart from its direction", source="Liu et al. 2024, arXiv:2402.09353"
    )

    def __attrs_post_init__(self) -> None:
        if self.dora and self.dropout:
            raise ValueError("dora has no dropout: leave one of them out")


@attrs.frozen(kw_only=True)
class FourBitConfig:
    quant_type: str = option(
        "nf4",
        help="the 16 values that a weight can take: quantiles of a normal distribution, or floats of 4 bits",
        source="Dettmers et al. 2023, arXiv:2305.14314, section 3",
        choices=("nf4", "fp4"),
    )
    double_quant: bool = option(True, help="keep the blocks' magnitudes in 8 bits: .37 bits less a weight")


@attrs.frozen(kw_only=True)
class EightBitConfig:
    threshold: float = option(
        6.0,
        help="on a GPU: input columns with a larger magnitude are multiplied in 16 bits; 0: none; no matter on a CPU",
        source="Dettmers et al. 2022, arXiv:2208.07339, section 3.2",
        ge=0,
    )


@hookimpl
def rlhf_memory() -> Iterator[MemoryEntry]:
    yield MemoryEntry(
        name="bf16",
        summary="bfloat16 matrix products over fp32 weights; frozen weights in bfloat16",
        impl="rlhf_plugins.memory.precision:BFloat16",
        phase="load",
        slot="precision",
        requires={"bf16"},
        rank=20,
    )
    yield MemoryEntry(
        name="fp32",
        summary="everything in float32",
        impl="rlhf_plugins.memory.precision:Float32",
        phase="load",
        slot="precision",
        rank=10,
    )
    # Of phase adapt, though they act when the weights are loaded: the precision, settled by then, is what they take.
    yield MemoryEntry(
        name="4bit",
        summary="linear weights in 4 bits, frozen under adapters (bitsandbytes nf4, double quantisation)",
        config=FourBitConfig,
        impl="rlhf_plugins.memory.quantised:FourBit",
        phase="adapt",
        slot="quantisation",
        provides={"quantised"},
        constraints=(under_adapters, bitsandbytes_from("0.48"), whole_blocks),
        modules=BITSANDBYTES,
    )
    yield MemoryEntry(
        name="8bit",
        summary="linear weights in 8 bits, frozen under adapters (bitsandbytes int8)",
        config=EightBitConfig,
        impl="rlhf_plugins.memory.quantised:EightBit",
        phase="adapt",
        slot="quantisation",
        provides={"quantised"},
        constraints=(under_adapters, bitsandbytes_from("0.48")),
        modules=BITSANDBYTES,
    )
    yield MemoryEntry(
        name="lora",
        summary="train low-rank adapters, the base frozen (PEFT)",
        config=LoraConfig,
        impl="rlhf_plugins.memory.lora:Lora",
        phase="adapt",
        applies="trainable",
        provides={"adapters"},
        constraints=(only_trained,),
    )
    yield MemoryEntry(
        name="checkpointing",
        summary="recompute each layer's activations in the backward instead of keeping them",
        impl="rlhf_plugins.memory.checkpointing:Checkpointing",
        phase="wrap",
        applies="trainable",
        constraints=(only_trained,),
    )
