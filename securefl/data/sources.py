"""Where records come from: scikit-learn's bundled sets, files, or a callable of the site's own."""

from __future__ import annotations

import gzip
import math
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from securefl.config import ConfigurationError, Data
from securefl.data import reading
from securefl.data.frames import Frame
from securefl.data.tables import Table, from_frames
from securefl.schema import Schema

SUFFIXES = (".csv", ".tsv", ".parquet")

FILES = ("table", "heart-disease", "mnist")
"""Sources that are read from data.path."""

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")

# Columns 10 to 12 of the files (slope, ca, thal) are mostly missing outside Cleveland.
HEART_COLUMNS = {
    0: "age",
    1: "sex",
    2: "cp",
    3: "trestbps",
    4: "chol",
    5: "fbs",
    6: "restecg",
    7: "thalach",
    8: "exang",
    9: "oldpeak",
    13: "disease",
}
# Declared by the data set's description, not read from the rows.
HEART_CATEGORIES = {"cp": (1, 2, 3, 4), "restecg": (0, 1, 2)}


def load(data: Data) -> Table:
    """All records that `data` names.

    Sources: "breast-cancer" (569 x 30), "digits" (1797 x 1 x 8 x 8) and "diabetes" (442 x 10, in
    the units they were measured in) come with scikit-learn; "table" is a CSV, TSV or Parquet
    file, or a folder of them (then group "file" tells them apart by stem); "heart-disease" is a
    folder with the four processed.HOSPITAL.data files; "mnist" is a folder with MNIST's four idx
    files, gzipped or not (Fashion-MNIST's bear the same names); "module:callable" is called with
    `data` and returns a Table. Columns in `data.drop` are no features, but remain as groups.

    Raises ConfigurationError naming the file, the column, the row and the value that is wrong.
    """
    if ":" in data.source:
        return _call(data)
    if data.label is not None and data.source != "table":
        raise ConfigurationError(
            f'data.label is read only with source = "table": drop {data.label!r}'
        )
    if data.path is not None and data.source not in FILES:
        known = ", ".join(f'"{name}"' for name in FILES)
        raise ConfigurationError(f"data.path is read only with source = {known}: drop {data.path}")
    sources: dict[str, Callable[[Data], Table]] = {
        "breast-cancer": _breast_cancer,
        "digits": _digits,
        "diabetes": _diabetes,
        "table": _table,
        "heart-disease": _heart_disease,
        "mnist": _mnist,
    }
    return sources[data.source](data)


def files(path: Path) -> dict[str, Path]:
    """Every file (or folder of images) that `path` names, by what tells it from the others.

    A name with a `*` gives each by what the star stands for, in order; a folder each table in it by
    its stem. Raises ConfigurationError where there is none.
    """
    before, star, after = path.name.partition("*")
    if star:
        found = sorted(path.parent.glob(path.name)) if path.parent.is_dir() else []
        named = {each.name[len(before) : len(each.name) - len(after)]: each for each in found}
    else:
        found = [each for each in path.iterdir() if each.is_file()] if path.is_dir() else [path]
        found = sorted(each for each in found if not each.name.startswith("."))
        named = {each.stem: each for each in found}
        if len(named) < len(found):
            raise ConfigurationError(f"data.path = {path}: two files have one stem: rename one")
    if not named:
        raise ConfigurationError(f"data.path = {path}: there is no such file")
    return named


def load_frames(data: Data) -> dict[str, Frame]:
    """The labelled rows of every file that `data` names, as its schema reads them.

    The column of text "file" says which file a row is from.
    """
    assert data.path is not None  # noqa: S101 - without a path the sites bring their own
    assert data.agreed is not None  # noqa: S101
    alone = data.agreed.image is not None and "*" not in data.path.name
    named = {data.path.stem: data.path} if alone else files(data.path)
    return {name: load_frame(path, data.agreed, name) for name, path in named.items()}


def load_frame(path: Path, schema: Schema, name: str) -> Frame:
    """The labelled rows of one file; `name`: what the column "file" says."""
    frame = reading.load(path, schema)
    if not frame.labelled.all():
        frame = frame.take(frame.labelled)
    told = {**frame.texts, "file": np.full(len(frame), name)}
    return replace(frame, texts=told)


def _call(data: Data) -> Table:
    from securefl.models import load_callable  # torch, which the other sources do without

    table = load_callable(data.source)(data)
    if not isinstance(table, Table):
        raise ConfigurationError(
            f"data.source = {data.source!r} returned {type(table).__name__}: return a "
            "securefl.data.Table"
        )
    return table


def _breast_cancer(data: Data) -> Table:
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer(as_frame=True)
    frame = bunch.frame.rename(columns={"target": "diagnosis"})
    frame["diagnosis"] = frame["diagnosis"].map(dict(enumerate(map(str, bunch.target_names))))
    declared = _default(data, classes=tuple(map(str, bunch.target_names)))
    return from_frames({"breast-cancer": frame}, "diagnosis", declared)


def _digits(data: Data) -> Table:
    from sklearn.datasets import load_digits

    if data.drop:
        raise ConfigurationError("data.drop leaves a hole in an image: drop nothing from digits")
    frame = load_digits(as_frame=True).frame.rename(columns={"target": "digit"})
    declared = _default(data, classes=tuple(map(str, range(10))))
    return from_frames({"digits": frame}, "digit", declared, shape=(1, 8, 8))


def _diabetes(data: Data) -> Table:
    from sklearn.datasets import load_diabetes

    # scaled=True would divide by statistics of the pooled rows.
    frame = load_diabetes(as_frame=True, scaled=False).frame
    return from_frames({"diabetes": frame}, "target", _default(data, task="regression"))


def _default(
    data: Data, *, classes: tuple[str, ...] | None = None, task: str = "classification"
) -> Data:
    """`data` with the task and the classes of a known set where none is declared."""
    task = data.task or task
    if task == "regression":
        classes = None
    return data.model_copy(update={"task": task, "classes": data.classes or classes})


def _table(data: Data) -> Table:
    assert data.path is not None  # noqa: S101 (Data holds this)
    assert data.label is not None  # noqa: S101 (Data holds this)
    if not data.path.exists():
        raise ConfigurationError(f"data.path = {data.path}: no such file or folder")
    if not data.path.is_dir():
        return from_frames({str(data.path): _read(data.path, data)}, data.label, data)
    paths = sorted(path for path in data.path.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ConfigurationError(
            f"data.path = {data.path}: the folder holds no {', '.join(SUFFIXES)} file"
        )
    frames = {}
    for path in paths:
        frame = _read(path, data)
        if "file" in frame.columns:
            raise ConfigurationError(
                f"{path}: column 'file' would hide which file a record is from: rename it"
            )
        frames[str(path)] = frame.assign(file=path.stem)
    stems = [path.stem for path in paths]
    for stem in stems:
        if stems.count(stem) > 1:
            raise ConfigurationError(f"{data.path}: two files are called {stem!r}: rename one")
    return from_frames(frames, data.label, data, groups=("file",))


def _read(path: Path, data: Data) -> pd.DataFrame:
    """One file as it is, every column under the name in its header."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigurationError(f"{path} is none of {', '.join(SUFFIXES)}: convert or rename it")
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        # Read apart, because pandas quietly renames a column that comes twice.
        header = pd.read_csv(
            path,
            sep=separator,
            header=None,
            nrows=1,
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
        )
        names = [str(name).strip() for name in header.iloc[0]]
        as_written = {i: str for i, name in enumerate(names) if name in data.drop}
        with warnings.catch_warnings():
            # Fields beyond the header would be cut off with a warning.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                path,
                sep=separator,
                header=None,
                skiprows=1,
                names=range(len(names)),
                index_col=False,
                # Codes such as 007 stay what they are.
                dtype=as_written,
                # Only an empty field is missing; NA, ? or - is named in the error as it stands.
                keep_default_na=False,
                na_values=[""],
                skipinitialspace=True,
                encoding="utf-8-sig",
                low_memory=False,
            )
    except pd.errors.ParserWarning:
        raise ConfigurationError(
            f"{path}: row 1 has more fields than the header: mend the header"
        ) from None
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise _unreadable(path, error) from None
    frame.columns = pd.Index(names)
    return frame


def _read_parquet(path: Path) -> pd.DataFrame:
    pyarrow = reading.import_pyarrow(path)
    try:
        names = pyarrow.parquet.read_schema(path).names
        for name in names:
            if names.count(name) > 1:
                raise ConfigurationError(f"{path}: column {name!r} comes twice: rename one")
        frame: pd.DataFrame = pyarrow.parquet.read_table(path).to_pandas()
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from None
    return frame.reset_index(drop=frame.index.names == [None])


def _heart_disease(data: Data) -> Table:
    """UCI Heart Disease as FLamby prepares it (Ogier du Terrail et al. 2022, arXiv 2210.04620).

    13 features: three columns are left out, then records with a missing value, and chest pain
    and resting ECG are one-hot without their first category. Four groups by hospital; the group
    column "flamby" says which records FLamby trains on and which it tests on.
    """
    assert data.path is not None  # noqa: S101 (Data holds this)
    frames = {}
    for hospital in HOSPITALS:
        path = data.path / f"processed.{hospital}.data"
        try:
            raw = pd.read_csv(path, header=None, na_values="?", skipinitialspace=True)
        except (
            OSError,
            UnicodeDecodeError,
            pd.errors.ParserError,
            pd.errors.EmptyDataError,
        ) as error:
            raise _unreadable(path, error) from None
        if raw.shape[1] != 14:
            raise ConfigurationError(f"{path} has {raw.shape[1]} columns: the original has 14")
        frame = raw.rename(columns=HEART_COLUMNS)[list(HEART_COLUMNS.values())].dropna()
        frame = frame.reset_index(drop=True)
        for name, categories in HEART_CATEGORIES.items():
            odd = frame.loc[~frame[name].isin(categories), name]
            if len(odd):
                raise ConfigurationError(
                    f"{path}: column {name!r} holds {odd.iloc[0]!r}: expected one of {categories}"
                )
            for category in categories[1:]:
                frame[f"{name}_{category}"] = frame[name] == category
            frame = frame.drop(columns=name)
        frame["disease"] = (frame["disease"] > 0).map({False: "absent", True: "present"})
        frame["flamby"] = _flamby_split(frame["disease"], stratified=hospital != "switzerland")
        frames[str(path)] = frame.assign(hospital=hospital)
    declared = _default(data, classes=("absent", "present"))
    return from_frames(frames, "disease", declared, groups=("hospital", "flamby"))


def _flamby_split(disease: pd.Series[str], stratified: bool) -> NDArray[np.str_]:
    """ "train" or "test" for each record of a hospital, as FLamby divides them: 66 to 34."""
    rows = np.arange(len(disease))
    labels = disease if stratified else None
    _, test = train_test_split(rows, test_size=0.34, random_state=43, stratify=labels)
    return np.where(np.isin(rows, test), "test", "train")


def _mnist(data: Data) -> Table:
    """Images and labels as LeCun et al. published them; group column "mnist" is their split."""
    assert data.path is not None  # noqa: S101 (Data holds this)
    if data.drop:
        raise ConfigurationError("data.drop leaves a hole in an image: drop nothing from mnist")
    frames: dict[str, pd.DataFrame] = {}
    sizes = set()
    for stem, part in (("train", "train"), ("t10k", "test")):
        path, images = _read_idx(data.path, f"{stem}-images-idx3-ubyte", 3)
        labels_path, labels = _read_idx(data.path, f"{stem}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise ConfigurationError(
                f"{path} holds {len(images)} images, {labels_path} {len(labels)} labels: they "
                "belong to different sets"
            )
        rows, columns = images.shape[1:]
        sizes.add((rows, columns))
        names = [f"pixel_{i}_{j}" for i in range(rows) for j in range(columns)]
        frame = pd.DataFrame(images.reshape(len(images), -1), columns=names)
        frames[str(path)] = frame.assign(digit=labels, mnist=part)
    if len(sizes) > 1:
        raise ConfigurationError(f"{data.path}: training and test images differ in size")
    declared = _default(data, classes=tuple(map(str, range(10))))
    return from_frames(frames, "digit", declared, groups=("mnist",), shape=(1, *sizes.pop()))


def _read_idx(folder: Path, name: str, dimensions: int) -> tuple[Path, NDArray[np.uint8]]:
    """The array of bytes in an idx file of `folder`, gzipped or not, and where it was."""
    path = folder / f"{name}.gz"
    if not path.exists():
        path = folder / name
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None
    start = 4 + 4 * dimensions
    shape = tuple(int(extent) for extent in np.frombuffer(raw[4:start], ">u4"))
    if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) != start + math.prod(shape):
        raise ConfigurationError(
            f"{path} is not a whole idx file of bytes in {dimensions} dimensions: get it again"
        )
    return path, np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _unreadable(path: Path, error: Exception) -> ConfigurationError:
    if isinstance(error, OSError) and error.strerror:
        return ConfigurationError(f"cannot read {path}: {error.strerror}")
    if isinstance(error, UnicodeDecodeError):
        return ConfigurationError(f"{path} is not UTF-8 text: save it as UTF-8")
    if isinstance(error, pd.errors.EmptyDataError):
        return ConfigurationError(f"{path} is empty: it needs a header and records")
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ConfigurationError(f"cannot read {path}: {first_line}: mend or export it again")
