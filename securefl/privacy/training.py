"""Local training, with DP-SGD under a plan. The only user of Opacus.

Opacus computes per-sample gradients and clips them. Sampling and noise are drawn here, from a
keystream that the operating system seeds, because Opacus derives both the sampling rate and the
expected batch from the private number of records and has no cryptographic generator any more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from scipy.special import ndtri

from protocols.keystream import Keystream, Randomness, Seed
from securefl import config, models
from securefl.data import Table
from securefl.privacy.plan import RecordLocal

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Trainer:
    """One site's local training: global weights in, update out. Holds the site's records."""

    def __init__(
        self,
        module: torch.nn.Module,
        loss: Loss,
        table: Table,
        training: config.Training,
        plan: RecordLocal | None,
        device: torch.device,
    ) -> None:
        self._module = module.to(device)
        self._loss = loss
        self._training = training
        self._plan = plan
        self._features = torch.from_numpy(table.features).to(device)
        self._target = torch.from_numpy(table.target).to(device)
        self._layout = models.layout(module)
        # Losses are summed and the optimiser divides by the public expected batch.
        self._sampled = GradSampleModule(module, loss_reduction="sum") if plan else None

    def update(
        self, weights: NDArray[np.float32], mask: NDArray[np.bool_], randomness: Randomness
    ) -> NDArray[np.float32]:
        """The change of `weights` (float32[d]) after local training; zero where `mask` is false.

        Starts a fresh local optimiser, so that a site carries nothing from round to round.
        """
        models.assign(self._module, weights)
        self._module.train()
        masks = [
            torch.from_numpy(mask[part].reshape(shape)).to(parameter)
            for part, shape, parameter in zip(
                self._layout.slices(), self._layout.shapes, self._module.parameters(), strict=True
            )
        ]
        seed = Seed.draw(randomness)
        if self._plan is None:
            self._descend(masks, seed)
        else:
            self._descend_privately(self._plan, masks, seed)
        return models.flatten(self._module) - weights

    def _descend(self, masks: list[torch.Tensor], seed: Seed) -> None:
        """Mini-batch steps on shuffled records: no privacy."""
        optimiser = models.optimiser(self._training, self._module.parameters())
        parameters = list(self._module.parameters())
        batches = _batches(len(self._target), self._training.batch_size, seed)
        for _ in range(self._training.local_steps):
            rows = next(batches)
            optimiser.zero_grad()
            self._loss(self._module(self._features[rows]), self._target[rows]).mean().backward()  # type: ignore[no-untyped-call]
            for parameter, keep in zip(parameters, masks, strict=True):
                if parameter.grad is not None:
                    parameter.grad *= keep
            optimiser.step()
            _prune(parameters, masks)

    def _descend_privately(self, plan: RecordLocal, masks: list[torch.Tensor], seed: Seed) -> None:
        """DP-SGD steps on Poisson samples. An empty sample still adds its noise."""
        assert self._sampled is not None  # noqa: S101 - built with the plan
        parameters = list(self._module.parameters())
        optimiser = _NoisyOptimiser(
            models.optimiser(self._training, self._module.parameters()), plan, masks, seed
        )
        samples = Keystream(seed, "poisson sampling")
        for _ in range(self._training.local_steps):
            rows = torch.from_numpy(samples.uniform(len(self._target)) < plan.rate)
            rows = rows.to(self._target.device)
            optimiser.zero_grad()
            with warnings.catch_warnings():
                # Inputs need no gradient; torch says so at every step.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                output = self._sampled(self._features[rows])
                self._loss(output, self._target[rows]).sum().backward()  # type: ignore[no-untyped-call]
            # A pruned coordinate counts neither in a record's norm nor in the noise. Clipping
            # cannot bound what is not finite: one such record would show itself in the sum.
            for parameter, keep in zip(parameters, masks, strict=True):
                each = torch.nan_to_num(parameter.grad_sample, 0.0, 0.0, 0.0)  # type: ignore[attr-defined]
                parameter.grad_sample = each * keep  # type: ignore[attr-defined]
            optimiser.step()
            _prune(parameters, masks)


class _NoisyOptimiser(DPOptimizer):  # type: ignore[misc]
    """Opacus's clipping with noise from a cryptographic keystream, on surviving weights only."""

    def __init__(
        self,
        optimiser: torch.optim.Optimizer,
        plan: RecordLocal,
        masks: list[torch.Tensor],
        seed: Seed,
    ) -> None:
        super().__init__(
            optimiser,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.clip,
            expected_batch_size=plan.expected_batch,
        )
        self._masks = masks
        self._noise = Keystream(seed, "gaussian noise")
        self._deviation = plan.noise_multiplier * plan.clip

    def add_noise(self) -> None:
        for parameter, keep in zip(self.params, self._masks, strict=True):
            noise = gaussian(self._noise, parameter.numel()) * self._deviation
            drawn = torch.from_numpy(noise).reshape(parameter.shape).to(keep)
            parameter.grad = parameter.summed_grad + drawn * keep


def gaussian(keystream: Keystream, count: int) -> NDArray[np.float64]:
    """`count` standard normal draws (float64), by inversion of 52-bit uniforms inside (0, 1)."""
    inside = ((keystream.words(count) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return np.asarray(ndtri(inside), np.float64)


def _batches(records: int, size: int, seed: Seed) -> Iterator[NDArray[np.int64]]:
    """Shuffled passes over the records in batches of `size`, without end."""
    shuffle = Keystream(seed, "shuffling")
    while True:
        order = np.argsort(shuffle.uniform(records), kind="stable")
        for start in range(0, records, size):
            yield order[start : start + size]


def _prune(parameters: list[torch.nn.Parameter], masks: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, keep in zip(parameters, masks, strict=True):
            parameter.mul_(keep)
