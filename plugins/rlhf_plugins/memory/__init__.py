"""Memory strategies: the precision of weights and matrix products, quantised weights, LoRA adapters, one base for
several roles, gradient checkpointing, weights that are elsewhere, and their moving average."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import ClassVar

import attrs

from rlhf.api import MemoryEntry, Times, copied, hookimpl, option
from rlhf.api import precision as stored  # a module beside this one has that name
from rlhf_plugins.memory import footprint
from rlhf_plugins.memory.rules import (
    adapters_of_the_base,
    alike_where_trained,
    bitsandbytes_from,
    elsewhere,
    ema_has_a_use,
    keeps_its_weights,
    offload_needs_gpu,
    one_base,
    only_frozen,
    only_trained,
    seen_with,
    somebody_shares,
    under_adapters,
    whole_blocks,
)

# bitsandbytes, which PEFT imports wherever it is installed, warns of a kernel that it lacks and that is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# DeepSpeed, which accelerate imports wherever it is installed, tells a machine without a GPU that it has none.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

BITSANDBYTES = {"bitsandbytes": "pip install 'rlhf-kit[quant]'"}
DEEPSPEED = {"deepspeed": "pip install 'rlhf-kit[deepspeed]'"}


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


@attrs.frozen(kw_only=True)
class ZeroConfig:
    """What DeepSpeed is to spread over ranks."""

    stage: ClassVar[int]
    offload: tuple[str, ...] = option(
        (), help="what a GPU's ranks keep in the memory of their machine", choices=("optimizer",)
    )


@attrs.frozen(kw_only=True)
class Zero1Config(ZeroConfig):
    """Options of `zero1`."""

    stage = 1


@attrs.frozen(kw_only=True)
class Zero2Config(ZeroConfig):
    """Options of `zero2`."""

    stage = 2


@attrs.frozen(kw_only=True)
class Zero3Config(ZeroConfig):
    """Options of `zero3`."""

    stage = 3
    offload: tuple[str, ...] = option(
        (), help="what a GPU's ranks keep in the memory of their machine", choices=("optimizer", "parameters")
    )
    keep_whole: int = option(
        100_000, help="parameters with fewer elements stay whole on every rank: fewer, larger gatherings",
        source="DeepSpeed's stage3_param_persistence_threshold", ge=0,
    )  # fmt: skip

    def __attrs_post_init__(self) -> None:
        if "parameters" in self.offload and "optimizer" not in self.offload:
            raise ValueError("DeepSpeed moves parameters away only with the optimizer: offload optimizer,parameters")


@attrs.frozen(kw_only=True)
class OffloadConfig:
    to: str = option(
        "auto",
        help="where weights lie between visits: the host's memory, or a file that a visit maps into memory; auto is "
        "the host's memory where the device is a GPU, else a file",
        choices=("auto", "host", "disk"),
    )
    folder: str | None = option(
        None, help="where the file is written; left out, the system's folder for temporary files (TMPDIR)"
    )


@attrs.frozen(kw_only=True)
class CheckpointingConfig:
    offload: bool = option(
        False, help="keep the inputs of the layers in the host's memory until the backward; needs a GPU"
    )


@attrs.frozen(kw_only=True)
class Float16Config:
    initial_scale: float = option(
        65536.0,
        help="what the loss is multiplied by at first; a power of two rounds nothing",
        source="torch.amp.GradScaler",
        ge=1,
    )
    growth_interval: int = option(
        2000,
        help="optimiser steps without an overflow after which the scale is doubled",
        unit="steps",
        source="torch.amp.GradScaler",
        ge=1,
    )


@attrs.frozen(kw_only=True)
class EmaConfig:
    decay: float = option(
        0.99,
        help="share of the average that each optimiser step keeps. Half of what it holds is older than ln 2 / (1 - "
        "decay) steps: .99 is 69, .999 is 693",
        source="Polyak & Juditsky 1992; Izmailov et al. 2018, arXiv:1803.05407",
        ge=0,
        lt=1,
    )
    evaluate: bool = option(True, help="held-out numbers, and so the best checkpoint, are the average's")
    save: bool = option(True, help="the saved model is the average; a checkpoint holds both in any case")


@hookimpl
def rlhf_memory() -> Iterator[MemoryEntry]:
    yield MemoryEntry(
        name="bf16",
        summary="bfloat16 matrix products over fp32 weights; frozen weights in bfloat16",
        impl="rlhf_plugins.memory.precision:BFloat16",
        phase="load",
        slot="precision",
        requires={"bf16"},
        footprint=stored(trained=4, frozen=2, compute=2),
        rank=20,
        worthwhile={"fast-bf16"},
    )
    yield MemoryEntry(
        name="fp32",
        summary="everything in float32",
        impl="rlhf_plugins.memory.precision:Float32",
        phase="load",
        slot="precision",
        footprint=stored(trained=4, frozen=4, compute=4),
        rank=10,
    )
    yield MemoryEntry(
        name="fp16",
        summary="float16 matrix products over fp32 weights, the loss scaled; for GPUs without bfloat16",
        config=Float16Config,
        impl="rlhf_plugins.memory.precision:Float16",
        phase="load",
        slot="precision",
        requires={"whole-gradients"},
        footprint=stored(trained=4, frozen=2, compute=2),
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
        footprint=footprint.four_bit,
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
        constraints=(under_adapters, bitsandbytes_from("0.48"), keeps_its_weights),
        footprint=footprint.eight_bit,
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
        footprint=footprint.lora,
        # The best rate of adapters is some ten times that of whole weights, in SFT as in RL, whatever their rank.
        defaults={"optim.learning_rate": Times(10.0, "LoRA Without Regret, Schulman et al. 2025")},
    )
    yield MemoryEntry(
        name="shared-base",
        summary="one base for several roles, each with adapters and a head of its own on it",
        impl="rlhf_plugins.memory.shared_base:SharedBase",
        phase="adapt",
        provides={"one-base"},
        requires={"whole-weights"},
        constraints=(one_base, somebody_shares, adapters_of_the_base),
        footprint=footprint.shared_base,
    )
    yield MemoryEntry(
        name="checkpointing",
        summary="recompute each layer's activations in the backward instead of keeping them",
        config=CheckpointingConfig,
        impl="rlhf_plugins.memory.checkpointing:Checkpointing",
        phase="wrap",
        applies="trainable",
        constraints=(only_trained, offload_needs_gpu),
        footprint=footprint.checkpointing,
    )
    yield MemoryEntry(
        name="ema",
        summary="an exponential moving average of the trained weights, evaluated and saved in their place",
        config=EmaConfig,
        impl="rlhf_plugins.memory.ema:Ema",
        phase="wrap",
        applies="trainable",
        requires={"whole-weights"},
        constraints=(only_trained, ema_has_a_use),
        footprint=copied("average", bytes_each=4, of="trained"),
    )
    yield MemoryEntry(
        name="offload",
        summary="frozen weights on the device only while their role scores, else in the host's memory or a file",
        config=OffloadConfig,
        impl="rlhf_plugins.memory.offload:Offload",
        phase="shard",
        applies="frozen",
        conflicts={"quantised"},
        constraints=(only_frozen, elsewhere),
        footprint=footprint.offload,
    )
    spread: dict[type[ZeroConfig], str] = {
        Zero1Config: "optimiser state",
        Zero2Config: "optimiser state and gradients",
        Zero3Config: "optimiser state, gradients and weights",
    }
    for config, what in spread.items():
        yield MemoryEntry(
            name=f"zero{config.stage}",
            summary=f"{what} spread over the ranks (DeepSpeed ZeRO-{config.stage})",
            config=config,
            impl="rlhf.interfaces:MemoryStrategy",  # what it asks for, the backend does
            phase="shard",
            applies="trainable",
            slot="sharding",
            requires={"zero"},
            constraints=(only_trained, alike_where_trained, seen_with("deepspeed", "0.19.8")),
            footprint=footprint.zero,
            modules=DEEPSPEED,
        )
