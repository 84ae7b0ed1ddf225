"""The precision of weights in memory and of matrix products. A role has one."""

from __future__ import annotations

import attrs
import torch

from rlhf.api import LoadSpec, LossScaler, MemoryStrategy
from rlhf_plugins.memory import Float16Config


class BFloat16(MemoryStrategy):
    """bfloat16 matrix products (autocast) over float32 weights where they are trained: an update of a small learning
    rate is below bfloat16's resolution, 2^-8 of a weight, and would be lost. Frozen weights are kept in bfloat16."""

    def load(self, spec: LoadSpec) -> LoadSpec:
        if spec.trainable:
            return attrs.evolve(spec, weights=torch.float32, compute=torch.bfloat16)
        return attrs.evolve(spec, weights=torch.bfloat16, compute=None)


class Float32(MemoryStrategy):
    """float32 weights and products: what exactness is tested in."""

    def load(self, spec: LoadSpec) -> LoadSpec:
        return attrs.evolve(spec, weights=torch.float32, compute=None)


class Float16(MemoryStrategy):
    """float16 matrix products (autocast) over float32 weights where they are trained; frozen weights in float16.
    Numbers reach from 6e-8 to 65504: small gradients need a scaled loss (`rlhf.scaling`), and larger activations make
    the loss infinite, which ends the run."""

    config: Float16Config

    def load(self, spec: LoadSpec) -> LoadSpec:
        if spec.trainable:
            return attrs.evolve(spec, weights=torch.float32, compute=torch.float16)
        return attrs.evolve(spec, weights=torch.float16, compute=None)

    def loss_scaler(self) -> LossScaler:
        return LossScaler(self.config.initial_scale, self.config.growth_interval)
