"""Local training, and what a site gives under a plan. The only user of Opacus.

Opacus computes per-sample gradients. Clipping happens in integers (`integers.clipped_sum`), so that
a record's bound is exact and no low-order bit of a float leaks. Sampling and noise are drawn from a
keystream that the operating system seeds: Opacus derives the sampling rate and the expected batch
from the private number of records, and has no cryptographic generator any more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from protocols.keystream import Keystream, Randomness, Seed
from protocols.noise import DiscreteGaussian
from securefl import config, models
from securefl.data import Table
from securefl.privacy import integers
from securefl.privacy.plan import Plan, RecordDistributed, RecordLocal, SiteDistributed

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_MOST_NUMBERS = 1 << 23  # of per-sample gradients at a time


class Trainer:
    """One site's local training: global weights in, update out. Holds the site's records."""

    def __init__(
        self,
        module: torch.nn.Module,
        loss: Loss,
        table: Table,
        training: config.Training,
        plan: Plan | None,
        device: torch.device,
        person: str | None = None,
    ) -> None:
        self._module = module.to(device)
        self._loss = loss
        self._training = training
        self._plan = plan
        self._features = torch.from_numpy(table.features).to(device)
        self._target = torch.from_numpy(table.target).to(device)
        self._layout = models.layout(module)
        # Whose gradients are sampled and clipped: each row, or all rows of a person together.
        self._person: NDArray[np.int64] | None = None
        self._protected = len(table)
        if person is not None:
            people, self._person = np.unique(table.groups[person], return_inverse=True)
            self._protected = len(people)
        # Losses are summed; who uses the sum divides by the public expected batch.
        self._sampled = None
        if isinstance(plan, RecordLocal | RecordDistributed):
            from opacus import GradSampleModule  # slow to import; only these plans need it

            self._sampled = GradSampleModule(module, loss_reduction="sum")

    def update(
        self, weights: NDArray[np.float32], mask: NDArray[np.bool_], randomness: Randomness
    ) -> NDArray[np.float32]:
        """The change of `weights` (float32[d]) after local training; zero where `mask` is false.

        Starts a fresh local optimiser, so that a site carries nothing from round to round.
        """
        if not (self._plan is None or isinstance(self._plan, RecordLocal)):
            raise ValueError("under a distributed plan only sums may be seen: use noised_sum")
        return self._trained(weights, mask, self._plan, randomness)

    def _trained(
        self,
        weights: NDArray[np.float32],
        mask: NDArray[np.bool_],
        plan: RecordLocal | None,
        randomness: Randomness,
    ) -> NDArray[np.float32]:
        models.assign(self._module, weights)
        self._module.train()
        masks, seed = self._shaped(mask), Seed.draw(randomness)
        if plan is None:
            self._descend(masks, seed)
        else:
            self._descend_privately(plan, masks, seed)
        return models.flatten(self._module) - weights

    def _shaped(self, mask: NDArray[np.bool_]) -> list[torch.Tensor]:
        """The pruning mask as one tensor of zeros and ones a parameter."""
        return [
            torch.from_numpy(mask[part].reshape(shape)).to(parameter)
            for part, shape, parameter in zip(
                self._layout.slices(), self._layout.shapes, self._module.parameters(), strict=True
            )
        ]

    def noised_sum(
        self, weights: NDArray[np.float32], mask: NDArray[np.bool_], randomness: Randomness
    ) -> NDArray[np.int64]:
        """This site's share of a distributed mechanism, int64[surviving weights], in grid units.

        Against the gradient, so that adding it descends. Under a `RecordDistributed` plan one
        Poisson-sampled step of clipped gradients; under a `SiteDistributed` one the clipped update
        of whole local training. With this site's noise in it; only sums may be seen.
        """
        plan = self._plan
        if isinstance(plan, SiteDistributed):
            update = torch.from_numpy(self._trained(weights, mask, None, randomness)[None, mask])
            seed = Seed.draw(randomness)
            fine = integers.clipped_sum([update], plan.clip, plan.units)
            rounding = Keystream(seed, "rounding")
            total = integers.conditionally_rounded(fine, plan.sensitivity, rounding)
        elif isinstance(plan, RecordDistributed):
            models.assign(self._module, weights)
            self._module.train()
            seed = Seed.draw(randomness)
            samples = Keystream(seed, "poisson sampling")
            fine = self._clipped_sum(plan.rate, plan.clip, plan.units, self._shaped(mask), samples)
            total = integers.dithered(-fine[mask], Keystream(seed, "rounding"))
        else:
            raise ValueError("only a distributed plan has noised sums")
        noise = DiscreteGaussian(plan.deviation)
        return total + noise.sample(Keystream(seed, "discrete gaussian noise"), len(total))

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
        parameters = list(self._module.parameters())
        optimiser = models.optimiser(self._training, self._module.parameters())
        samples, noise = Keystream(seed, "poisson sampling"), Keystream(seed, "gaussian noise")
        kept = torch.cat([keep.reshape(-1) for keep in masks])
        unit = plan.clip / plan.units / plan.expected_batch
        for _ in range(self._training.local_steps):
            total = self._clipped_sum(plan.rate, plan.clip, plan.units, masks, samples)
            noised = integers.hardened(total, plan.deviation, noise)
            gradient = torch.from_numpy(noised * unit).to(kept) * kept
            for parameter, part in zip(parameters, self._layout.slices(), strict=True):
                parameter.grad = gradient[part].reshape(parameter.shape)
            optimiser.step()
            _prune(parameters, masks)

    def _clipped_sum(
        self,
        rate: float,
        clip: float,
        units: int,
        masks: list[torch.Tensor],
        samples: Keystream,
    ) -> NDArray[np.int64]:
        """The sum over a Poisson sample of records (or people) of their clipped gradients.

        int64[d], in units of clip / units. A pruned coordinate counts neither in a gradient's norm
        nor in the sum.
        """
        total = np.zeros(self._layout.size, np.int64)
        drawn = np.flatnonzero(samples.uniform(self._protected) < rate)
        step = max(1, _MOST_NUMBERS // self._layout.size)
        for start in range(0, len(drawn), step):
            gradients = self._gradients(drawn[start : start + step], masks)
            total += integers.clipped_sum(gradients, clip, units)
        return total

    def _gradients(self, drawn: NDArray[np.int64], masks: list[torch.Tensor]) -> list[torch.Tensor]:
        """The gradient of each record in `drawn`, or each person's mean gradient: [len(drawn), ...]
        a parameter."""
        assert self._sampled is not None  # noqa: S101 - built with the plan
        rows = drawn
        if self._person is not None:
            rows = np.flatnonzero(np.isin(self._person, drawn))
        at = torch.from_numpy(rows).to(self._target.device)
        self._sampled.zero_grad()
        with warnings.catch_warnings():
            # Inputs need no gradient; torch says so at every step.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            output = self._sampled(self._features[at])
            self._loss(output, self._target[at]).sum().backward()  # type: ignore[no-untyped-call]
        each = [
            parameter.grad_sample * keep  # type: ignore[attr-defined]
            for parameter, keep in zip(self._module.parameters(), masks, strict=True)
        ]
        if self._person is None:
            return each
        position = np.searchsorted(drawn, self._person[rows])
        share = torch.from_numpy(1.0 / np.bincount(position)[position]).to(each[0])
        to = torch.from_numpy(position).to(at.device)
        return [
            part.new_zeros(len(drawn), *part.shape[1:]).index_add(
                0, to, part * share.reshape(-1, *[1] * (part.ndim - 1))
            )
            for part in each
        ]


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
