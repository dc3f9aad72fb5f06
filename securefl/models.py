"""Networks by name, and the border between torch modules and flat numpy vectors."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from securefl.config import ConfigurationError, Model, Training

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs [batch, outputs], targets [batch]) -> the loss of every sample [batch]."""

REPLACEMENTS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.modules.batchnorm._BatchNorm, "torch.nn.GroupNorm"),
    (nn.LSTM, "opacus.layers.DPLSTM"),
    (nn.GRU, "opacus.layers.DPGRU"),
    (nn.RNN, "opacus.layers.DPRNN"),
    (nn.MultiheadAttention, "opacus.layers.DPMultiheadAttention"),
)
"""Layers that have no per-sample gradients, and what has."""


def build(model: Model, shape: tuple[int, ...], outputs: int, seed: int) -> nn.Module:
    """The network `model` names, for features of `shape`, giving [batch, outputs] float32.

    "linear" and "logistic" are one linear layer over the flattened features ("logistic" gives
    logits), "mlp" has a tanh layer for each of `model.hidden`, "cnn" is two convolutions for images
    [channels, height, width] of at least 8 x 8, and "small-cnn" those of Papernot et al. 2021 with
    tanh (26,010 parameters on MNIST) for images of at least 16 x 16; a callable is called as
    `callable(shape, outputs)`. The public `seed` decides the weights; torch's generator is left as
    it was.

    Formal guarantee: no layer of the network mixes samples or keeps statistics of them in a
    buffer, as far as its types and a trial run tell.
    Raises ConfigurationError naming the layer and its replacement.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if ":" in model.name:
            module = load_callable(model.name)(shape, outputs)
            if not isinstance(module, nn.Module):
                raise ConfigurationError(
                    f"model.name = {model.name!r} returned {type(module).__name__}: return a "
                    "torch.nn.Module"
                )
        elif model.name == "cnn":
            module = _cnn(shape, outputs)
        elif model.name == "small-cnn":
            module = _small_cnn(shape, outputs)
        else:
            module = _layers(shape, model.hidden if model.name == "mlp" else (), outputs)
        _check_layers(module, model.name)
        _check_trial(module, model.name, shape, outputs)
    return module


def _layers(shape: tuple[int, ...], hidden: tuple[int, ...], outputs: int) -> nn.Module:
    widths = (math.prod(shape), *hidden)
    layers: list[nn.Module] = [nn.Flatten()] if len(shape) > 1 else []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def _cnn(shape: tuple[int, ...], outputs: int) -> nn.Module:
    if len(shape) != 3 or min(shape[1:]) < 8:
        raise ConfigurationError(
            f'model.name = "cnn" needs images [channels, height, width] of at least 8 x 8, but '
            f'the features have shape {list(shape)}: choose "mlp"'
        )
    channels, height, width = shape
    # Tanh, because bounded activations do better under DP-SGD (Papernot et al. 2021).
    return nn.Sequential(
        nn.Conv2d(channels, 32, kernel_size=3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), outputs),
    )


def _small_cnn(shape: tuple[int, ...], outputs: int) -> nn.Module:
    if len(shape) != 3 or min(shape[1:]) < 16:
        raise ConfigurationError(
            f'model.name = "small-cnn" needs images [channels, height, width] of at least 16 x 16, '
            f'but the features have shape {list(shape)}: choose "cnn" or "mlp"'
        )
    convolutions = nn.Sequential(
        nn.Conv2d(shape[0], 16, kernel_size=8, stride=2, padding=3),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(16, 32, kernel_size=4, stride=2),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        nn.Flatten(),
    )
    with torch.no_grad():
        width = convolutions(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(*convolutions, nn.Linear(width, 32), nn.Tanh(), nn.Linear(32, outputs))


def _check_layers(module: nn.Module, name: str) -> None:
    """Refuse layers and parameters known to break per-sample gradients."""
    for path, layer in module.named_modules():
        where = f"model.name = {name!r}: layer {path or 'at the top'!r}"
        for kind, replacement in REPLACEMENTS:
            if isinstance(layer, kind):
                raise ConfigurationError(
                    f"{where} is {type(layer).__name__}, which breaks per-sample gradients: use "
                    f"{replacement}"
                )
        if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
            raise ConfigurationError(
                f"{where} is {type(layer).__name__}, which keeps statistics of the records: set "
                "track_running_stats=False"
            )
    parameters = list(module.named_parameters())
    if not parameters:
        raise ConfigurationError(f"model.name = {name!r} has no parameters: there is none to train")
    for path, parameter in parameters:
        where = f"model.name = {name!r}: parameter {path!r}"
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigurationError(f"{where} has no shape yet: use the layer that is not lazy")
        if parameter.dtype != torch.float32:
            raise ConfigurationError(f"{where} is {parameter.dtype}: make it torch.float32")
        if not parameter.requires_grad:
            raise ConfigurationError(
                f"{where} does not require a gradient: train it, or make it a buffer"
            )


def _check_trial(module: nn.Module, name: str, shape: tuple[int, ...], outputs: int) -> None:
    """Refuse a network with the wrong output, or with buffers that training would change."""
    device = next(module.parameters()).device
    before = {path: buffer.clone() for path, buffer in module.named_buffers()}
    module.train()
    try:
        with torch.no_grad():
            given = module(torch.rand(2, *shape, device=device))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigurationError(
            f"model.name = {name!r} cannot take features of shape {list(shape)}: {first_line}"
        ) from error
    if not isinstance(given, Tensor) or given.shape != (2, outputs):
        shown = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ConfigurationError(
            f"model.name = {name!r} gives {shown} for a batch of two: give [2, {outputs}]"
        )
    _check_trial_by_itself(module, name, shape)
    for path, buffer in module.named_buffers():
        if path not in before or not torch.equal(buffer, before[path]):
            raise ConfigurationError(
                f"model.name = {name!r}: training changes buffer {path!r}, which would keep "
                "statistics of the records: use a layer without one, such as torch.nn.GroupNorm"
            )


def _check_trial_by_itself(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Refuse a network in which one sample changes what another gives, or a parameter is unused.

    A trial on public random samples, so it can find such a network out but not prove one good.
    """
    device = next(module.parameters()).device
    was_training = module.training
    module.eval()  # dropout draws anew for every batch
    with torch.no_grad():
        for spread in (0.1, 1.0, 10.0):
            batch = spread * (2 * torch.rand(8, *shape, device=device) - 1)
            together = module(batch)
            alone = torch.cat([module(sample[None]) for sample in batch])
            if not torch.allclose(together, alone, rtol=1e-3, atol=1e-4 * spread, equal_nan=True):
                raise ConfigurationError(
                    f"model.name = {name!r}: what a sample gives depends on the others in its "
                    "batch, so clipping cannot bound one record: treat each sample by itself"
                )
    module.train(was_training)
    module(torch.rand(2, *shape, device=device)).sum().backward()
    for path, parameter in module.named_parameters():
        if parameter.grad is None:
            raise ConfigurationError(
                f"model.name = {name!r}: parameter {path!r} takes no part in the output: remove it"
            )
        parameter.grad = None


def loss(model: Model, task: str) -> Loss:
    """The loss of every sample: (outputs [batch, outputs], targets [batch]) -> [batch].

    "auto" is cross-entropy for classification and squared error for regression; a callable
    takes the same two tensors and must give one value a sample.
    """
    if ":" in model.loss:
        return _checked(load_callable(model.loss), model.loss)
    fitting = "cross-entropy" if task == "classification" else "squared-error"
    if model.loss not in ("auto", fitting):
        raise ConfigurationError(f'model.loss = "{model.loss}" is not for {task}: use "{fitting}"')
    return _cross_entropy if task == "classification" else _squared_error


def weighted(loss: Loss, weights: Sequence[float]) -> Loss:
    """`loss` with every sample's share weighed by that of its class; without weights as it is."""
    if not weights:
        return loss
    told = torch.tensor(weights, dtype=torch.float32)

    def per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
        return loss(outputs, targets) * told.to(outputs.device)[targets]

    return per_sample


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs[:, 0] - targets) ** 2


def _checked(given: Callable[..., Any], reference: str) -> Loss:
    # What is said here holds no figure of a site's batch: its size is secret under a plan.
    def per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = given(outputs, targets)
        if not isinstance(losses, Tensor) or losses.shape != (len(targets),):
            raise ConfigurationError(
                f"model.loss = {reference!r} does not give one loss a sample: give a tensor of "
                'shape [batch] (reduction="none")'
            )
        return losses

    return per_sample


def optimiser(training: Training, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The local optimiser over `parameters`.

    A callable is called as `callable(parameters, lr=learning_rate)`, as torch's own are, with
    `momentum` and `weight_decay` besides where they are not zero.
    """
    options: dict[str, float] = {"lr": training.learning_rate}
    if training.momentum:
        options["momentum"] = training.momentum
    if training.weight_decay:
        options["weight_decay"] = training.weight_decay
    if training.optimiser == "adam" and training.momentum:
        raise ConfigurationError(
            f'training.momentum = {training.momentum} is for "sgd": drop it, adam has its own'
        )
    kinds: dict[str, Callable[..., Any]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    factory = kinds.get(training.optimiser) or load_callable(training.optimiser)
    try:
        made = factory(parameters, **options)
    except TypeError as error:
        raise ConfigurationError(
            f"training.optimiser = {training.optimiser!r} does not take {', '.join(options)}: "
            f"{error}"
        ) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigurationError(
            f"training.optimiser = {training.optimiser!r} returned {type(made).__name__}: return "
            "a torch.optim.Optimizer"
        )
    return made


@dataclass(frozen=True)
class Layout:
    """Where each parameter of a module lies in its flat vector [size].

    >>> layout = Layout(("weight", "bias"), ((2, 3), (2,)))
    >>> layout.size, layout.slices()
    (8, (slice(0, 6, None), slice(6, 8, None)))
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes) or not self.names:
            raise ValueError(f"{len(self.names)} names for {len(self.shapes)} shapes: one each")
        if len(set(self.names)) != len(self.names):
            raise ValueError("a parameter name comes twice")
        if any(extent < 1 for shape in self.shapes for extent in shape):
            raise ValueError(f"shapes {self.shapes} hold an extent below 1")

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers each parameter holds."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """How many numbers all parameters hold: d."""
        return sum(self.sizes)

    def slices(self) -> tuple[slice, ...]:
        """Where each parameter lies in the flat vector."""
        ends = np.cumsum((0, *self.sizes)).tolist()
        return tuple(slice(*pair) for pair in itertools.pairwise(ends))

    @property
    def prunable(self) -> NDArray[np.bool_]:
        """bool [size]: true for weights (two dimensions or more), false for biases and gains."""
        return np.repeat([len(shape) >= 2 for shape in self.shapes], self.sizes)


def layout(module: nn.Module) -> Layout:
    """The layout of `module.parameters()`, in their order."""
    named = list(module.named_parameters())
    return Layout(
        names=tuple(name for name, _ in named),
        shapes=tuple(tuple(parameter.shape) for _, parameter in named),
    )


def flatten(module: nn.Module) -> NDArray[np.float32]:
    """All parameters as one vector, a copy: float32 [d], in the order of `parameters()`."""
    pieces = [parameter.detach().reshape(-1).cpu().numpy() for parameter in module.parameters()]
    return np.concatenate(pieces).astype(np.float32, copy=False)


def assign(module: nn.Module, vector: NDArray[np.floating[Any]]) -> None:
    """Set the parameters from a vector [d], the inverse of `flatten`.

    Raises ValueError when the vector's shape is not [d]; the module is then unchanged.
    """
    parameters = list(module.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    if vector.shape != (size,):
        raise ValueError(f"vector has shape {vector.shape}, but the module has {size} parameters")
    flat = torch.from_numpy(np.array(vector, dtype=np.float32))
    with torch.no_grad():
        for parameter, where in zip(parameters, layout(module).slices(), strict=True):
            parameter.copy_(flat[where].view_as(parameter))


def load_callable(reference: str) -> Callable[..., Any]:
    """What "module:callable" names. It imports the module, so it must be installed and trusted.

    Raises ConfigurationError when it cannot be imported.

    >>> load_callable("math:sqrt")(4.0)
    2.0
    """
    place, _, name = reference.partition(":")
    try:
        module = importlib.import_module(place)
    except ImportError as error:
        raise ConfigurationError(
            f"cannot import {reference!r}: {error}: install it at this site, or put its folder on "
            "PYTHONPATH"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        known = ", ".join(key for key in vars(module) if not key.startswith("_"))[:200]
        problem = "has no" if found is None else "holds a value, no callable, as"
        raise ConfigurationError(
            f"{reference!r}: module {place!r} {problem} {name!r}; it has {known or 'nothing'}"
        )
    return found  # type: ignore[no-any-return]
