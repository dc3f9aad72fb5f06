"""A trained model on a new file: the same reading, preprocessing and network as in the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, Self, final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from torch import nn

from securefl import config, models, schema
from securefl.config import ConfigurationError
from securefl.data import Frame, reading
from securefl.preprocessing import NOISY, Fitted, FittedNumber, Preprocessor
from securefl.records import MODEL
from securefl.schema import CategoryColumn, NumberColumn, Schema

WEIGHTS: Final = "model.safetensors"

_LABEL: Final = "(label)"
_WIDEST: Final = (-1e30, 1e30)


class Scaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The declared ranges that features and target were scaled by, where no schema says them."""

    ranges: dict[str, tuple[float, float]]
    default_range: tuple[float, float] | None = None
    target_range: tuple[float, float] | None = None


class About(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `model.json` says of the weights beside it.

    inputs: what each input is, in words. threshold: from which probability the last of two classes
    is predicted. schema, drop, preprocessing and fitted: only where records
    were read by a schema.
    """

    version: Literal[1]
    model: dict[str, Any]
    shape: tuple[int, ...]
    outputs: int
    task: schema.Task
    features: tuple[str, ...]
    classes: tuple[str, ...]
    scaling: Scaling
    update: int
    sparsity: float
    private: bool
    schema: dict[str, Any] | None = None
    drop: tuple[str, ...] = ()
    preprocessing: dict[str, Any] | None = None
    fitted: Fitted | None = None
    inputs: dict[str, str] = {}
    threshold: float = 0.5


@final
@dataclass(frozen=True)
class Predictions:
    """What a model says of the rows of one chunk of a file.

    first: the number of the first row, from 1. known: bool[n], false where a required value is
    missing and nothing is predicted. values: float64[n, classes], the probability of each class; or
    float64[n, 1] in the label's own unit.
    """

    first: int
    known: NDArray[np.bool_]
    values: NDArray[np.float64] = field(repr=False)


@final
class Model:
    """The model in a run directory, ready for a new file."""

    def __init__(self, about: About, module: nn.Module, preprocessor: Preprocessor) -> None:
        self.about = about
        self._module = module.eval()
        self._preprocessor = preprocessor
        self._fitted = about.fitted or _declared(about, preprocessor.start())

    @classmethod
    def load(cls, directory: Path) -> Self:
        """The model of a finished run; ConfigurationError when it is not there or damaged."""
        path = directory / MODEL
        try:
            about = msgspec.json.decode(path.read_bytes(), type=About)
            tensors = load_tensors((directory / WEIGHTS).read_bytes())
            settings = config.Model.model_validate(about.model)
            preprocessor = _preprocessor(about)
            module = models.build(settings, about.shape, about.outputs, 0)
            module.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in tensors.items()})
        except FileNotFoundError as error:
            raise ConfigurationError(
                f"{directory} holds no model (no {Path(error.filename).name}): give the directory "
                "of a finished run"
            ) from None
        except OSError as error:
            raise ConfigurationError(f"cannot read {error.filename}: {error.strerror}") from None
        except ConfigurationError:
            raise
        except (msgspec.MsgspecError, SafetensorError, RuntimeError, ValueError) as error:
            told = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigurationError(
                f"{path} and {WEIGHTS} beside it do not fit together: {told}; restore them from a "
                "copy"
            ) from None
        return cls(about, module, preprocessor)

    def predict(self, path: Path) -> Iterator[Predictions]:
        """What the model says of every row of the file `path`, some rows at a time.

        The file is read as the schema says; a label is not needed, and not looked at.
        """
        first = 1
        for frame in reading.read(path, self._readable):
            told = self._labelled(frame)
            known = self._preprocessor.usable(told)
            values = np.full((len(told), self.about.outputs), np.nan)
            if known.any():
                table = self._preprocessor.apply(self._fitted, told)
                values[known] = self._outputs(table.features)
            yield Predictions(first, known, values)
            first += len(frame)

    def chosen(self, part: Predictions) -> NDArray[np.int64]:
        """The number of the class that is predicted for each row, int64[n]; 0 where none is."""
        values = np.nan_to_num(part.values)
        if len(self.about.classes) == 2:
            return np.asarray(values[:, 1] >= self.about.threshold, np.int64)
        return np.asarray(values.argmax(axis=1), np.int64)

    @property
    def _readable(self) -> Schema:
        """The schema, in which only features are asked for."""
        full, features = self._preprocessor.schema, self._features
        columns = {
            name: column if name in features else _loose(column)
            for name, column in full.columns.items()
        }
        return full.model_copy(update={"columns": columns, "person": None, "test": None})

    @property
    def _features(self) -> frozenset[str]:
        return frozenset(self._preprocessor.columns)

    def _labelled(self, frame: Frame) -> Frame:
        """The rows with a label that stands for none, which no prediction reads."""
        full, label = self._preprocessor.schema, self._preprocessor.schema.label
        if full.target_range is None:
            codes = {**frame.codes, label: np.zeros(len(frame), np.int32)}
            return replace(frame, schema=full, codes=codes)
        numbers = {**frame.numbers, label: np.full(len(frame), full.target_range[0])}
        return replace(frame, schema=full, numbers=numbers)

    def _outputs(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        with torch.no_grad():
            shaped = torch.from_numpy(features.reshape(len(features), *self.about.shape))
            given = self._module(shaped).double()
            if self.about.task == "classification":
                given = torch.softmax(given, dim=1)
        values: NDArray[np.float64] = given.numpy()
        target = self._preprocessor.schema.target_range
        if target is not None and self.about.task == "regression":
            low, high = self.about.scaling.target_range or target
            if target != _WIDEST:
                values = (values + 1) / 2 * (high - low) + low
        return values


def _loose(column: schema.Column) -> schema.Column:
    changed: dict[str, Any] = {"optional": True}
    if isinstance(column, NumberColumn | CategoryColumn):
        changed["outside"] = "missing"
    return column.model_copy(update=changed)


def _preprocessor(about: About) -> Preprocessor:
    if about.schema is not None and about.preprocessing is not None:
        told = {"source": "table", "schema": about.schema, "drop": about.drop}
        settings = config.Preprocessing.model_validate(about.preprocessing)
        made = Preprocessor(config.Data.model_validate(told), settings, NOISY)
        of_schema = (made.shape, made.outputs, made.schema.task, made.inputs, made.schema.classes)
        if of_schema != (about.shape, about.outputs, about.task, about.features, about.classes):
            raise ValueError("the model is not of the schema")
        if about.fitted is None:
            raise ValueError("it does not say what preprocessing was fitted to")
        dict(made.described(about.fitted))  # or what was fitted is of other columns
        return made
    features = {
        name: {"type": "number", "range": _range(about, name), "outside": "clip"}
        for name in about.features
    }
    label: dict[str, Any] = {"type": "category", "categories": about.classes}
    if about.task == "regression":
        label = {"type": "number", "range": about.scaling.target_range or _WIDEST}
    columns = {**features, _LABEL: label}
    written = {"version": 1, "name": "model", "label": _LABEL, "columns": columns}
    data = config.Data.model_validate({"source": "table", "schema": written})
    settings = config.Preprocessing(
        scale="range", impute="middle", minimum_count=0, required=about.features
    )
    return Preprocessor(data, settings, NOISY)


def _range(about: About, name: str) -> tuple[float, float]:
    scaling = about.scaling
    return scaling.ranges.get(name) or scaling.default_range or _WIDEST


def _declared(about: About, start: Fitted) -> Fitted:
    """What stands for fitted values where none were fitted: the declared ranges, or nothing."""
    if about.schema is not None or about.scaling.ranges or about.scaling.default_range:
        return start
    unscaled = tuple(
        FittedNumber(number.name, 0.0, *_WIDEST, 0.0, 0.0, 1.0) for number in start.numbers
    )
    return msgspec.structs.replace(start, numbers=unscaled)
