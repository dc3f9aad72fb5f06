"""Local training, and what a site gives under a plan.

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
from securefl.privacy.rotation import Rotation

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
            # Opacus is slow to import, and only these plans need it.
            from securefl.privacy.gradients import PerSampleGradients

            self._sampled = PerSampleGradients(module, loss_reduction="sum")

    def update(
        self,
        weights: NDArray[np.float32],
        mask: NDArray[np.bool_],
        randomness: Randomness,
        clip_scale: float = 1.0,
    ) -> NDArray[np.float32]:
        """The change of `weights` (float32[d]) after local training; zero where `mask` is false.

        clip_scale: the clip over the plan's. Where the plan counts what is within the clip, one
        more number: the mean share of the steps, less one half, with its noise; float32[d + 1].
        Starts a fresh local optimiser, so that a site carries nothing from round to round.
        """
        if not (self._plan is None or isinstance(self._plan, RecordLocal)):
            raise ValueError("under a distributed plan only sums may be seen: use noised_sum")
        if self._plan is None:
            return self._trained(weights, mask, randomness)
        self._start(weights)
        masks, seed = self._shaped(mask), Seed.draw(randomness)
        told = self._descend_privately(self._plan, clip_scale, masks, seed)
        return np.append(models.flatten(self._module) - weights, told.astype(np.float32))

    def _start(self, weights: NDArray[np.float32]) -> None:
        models.assign(self._module, weights)
        self._module.train()

    def _trained(
        self, weights: NDArray[np.float32], mask: NDArray[np.bool_], randomness: Randomness
    ) -> NDArray[np.float32]:
        """The change of `weights` after local training without privacy, float32[d]."""
        self._start(weights)
        self._descend(self._shaped(mask), Seed.draw(randomness))
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
        self,
        weights: NDArray[np.float32],
        mask: NDArray[np.bool_],
        randomness: Randomness,
        clip_scale: float = 1.0,
        rotation: Rotation | None = None,
    ) -> NDArray[np.int64]:
        """This site's share of a distributed mechanism, int64[surviving weights], in grid units.

        clip_scale: the clip over the plan's; a grid unit stands for so much more. Where the plan
        counts what is within the clip, the count follows.

        Against the gradient, so that adding it descends. Under a `RecordDistributed` plan one
        Poisson-sampled step of clipped gradients; under a `SiteDistributed` one the clipped update
        of whole local training, rotated where there is a `rotation` of that many numbers. With this
        site's noise in it; only sums may be seen.
        """
        plan = self._plan
        if isinstance(plan, SiteDistributed):
            fine = self._clipped_update(plan, weights, mask, randomness, clip_scale, rotation)
            seed = Seed.draw(randomness)
            rounding = Keystream(seed, "rounding")
            total = integers.conditionally_rounded(fine, plan.sensitivity, rounding)
        elif isinstance(plan, RecordDistributed):
            self._start(weights)
            seed = Seed.draw(randomness)
            samples = Keystream(seed, "poisson sampling")
            clip = clip_scale * plan.clip
            fine = self._clipped_sum(plan, clip, self._shaped(mask), samples)
            fine = np.append(-fine[: self._layout.size][mask], fine[self._layout.size :])
            total = integers.dithered(fine, Keystream(seed, "rounding"))
        else:
            raise ValueError("only a distributed plan has noised sums")
        noise = DiscreteGaussian(plan.deviation)
        return total + noise.sample(Keystream(seed, "discrete gaussian noise"), len(total))

    def _clipped_update(
        self,
        plan: SiteDistributed,
        weights: NDArray[np.float32],
        mask: NDArray[np.bool_],
        randomness: Randomness,
        clip_scale: float,
        rotation: Rotation | None,
    ) -> NDArray[np.int64]:
        """The update of local training without noise, and the count, in fine units.

        A float tells if the update was within the clip, and the norm of all is bounded after that.
        """
        update = self._trained(weights, mask, randomness)[mask].astype(np.float64)
        clip = clip_scale * plan.clip
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is left out
            if plan.counted:
                norm = float(np.linalg.norm(update))
                told = clip * plan.count / plan.units * (1.0 if norm <= clip else -1.0)
                update = np.append(update * (clip / max(norm, clip)), told)
            if rotation is not None:
                update = rotation.rotate(update)
        whole = clip * (plan.bound / plan.units)
        return integers.clipped_sum([torch.from_numpy(update[None])], whole, plan.bound)

    def _descend(self, masks: list[torch.Tensor], seed: Seed) -> None:
        """Mini-batch steps on shuffled records: no privacy."""
        if not len(self._target):
            return  # a site without records moves nothing
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

    def _descend_privately(
        self, plan: RecordLocal, clip_scale: float, masks: list[torch.Tensor], seed: Seed
    ) -> NDArray[np.float64]:
        """DP-SGD steps on Poisson samples. An empty sample still adds its noise.

        Gives the mean share of records within the clip, less one half, float64[1]; float64[0] where
        the plan does not count them.
        """
        parameters = list(self._module.parameters())
        optimiser = models.optimiser(self._training, self._module.parameters())
        samples, noise = Keystream(seed, "poisson sampling"), Keystream(seed, "gaussian noise")
        kept = torch.cat([keep.reshape(-1) for keep in masks])
        clip, size = clip_scale * plan.clip, self._layout.size
        unit = clip / plan.units / plan.expected_batch
        counts = np.zeros(int(plan.counted))
        for _ in range(self._training.local_steps):
            total = self._clipped_sum(plan, clip, masks, samples)
            noised = integers.hardened(total, plan.deviation, noise)
            counts += noised[size:]
            gradient = torch.from_numpy(noised[:size] * unit).to(kept) * kept
            for parameter, part in zip(parameters, self._layout.slices(), strict=True):
                parameter.grad = gradient[part].reshape(parameter.shape)
            optimiser.step()
            _prune(parameters, masks)
        return counts / (2 * max(1, plan.count) * plan.expected_batch * self._training.local_steps)

    def _clipped_sum(
        self,
        plan: RecordLocal | RecordDistributed,
        clip: float,
        masks: list[torch.Tensor],
        samples: Keystream,
    ) -> NDArray[np.int64]:
        """The sum over a Poisson sample of records (or people) of their clipped gradients.

        int64[d], in units of clip / plan.units, and the plan's count after it. A pruned coordinate
        counts neither in a gradient's norm nor in the sum.
        """
        total = np.zeros(self._layout.size + plan.counted, np.int64)
        drawn = np.flatnonzero(samples.uniform(self._protected) < plan.rate)
        step = max(1, _MOST_NUMBERS // self._layout.size)
        for start in range(0, len(drawn), step):
            gradients = self._gradients(drawn[start : start + step], masks)
            total += integers.clipped_sum(gradients, clip, plan.units, plan.count)
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
        given = [part.grad_sample for part in self._module.parameters()]  # type: ignore[attr-defined]
        each = [
            part * keep if (keep == 0).any() else part
            for part, keep in zip(given, masks, strict=True)
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
