"""Durable state: written whole, synced, and renamed into place before anything depends on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from protocols.keystream import Randomness
from securefl.config import ConfigurationError

LOCK_SECONDS = 10.0
"""How long `SiteStore.bind` waits for a process that is ending."""

_Record = TypeVar("_Record", bound=msgspec.Struct)


class CorruptStoreError(RuntimeError):
    """A file of ours that does not hold what we wrote: names the file."""


def write(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, so that a crash at any instant leaves the old or the new whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_folder(path.parent)


def write_secret(path: Path, data: bytes) -> None:
    """Make `path`, readable by its owner only; FileExistsError, and nothing done, if it exists."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(partial, path)
    finally:
        partial.unlink()
    _sync_folder(path.parent)


def private_folder(folder: Path) -> None:
    """Make `folder`, which its owner only may enter."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def append_line(path: Path, line: str) -> None:
    """Add one line to `path` and sync it, in the place of a last one that a crash cut short."""
    append_lines(path, (line,))


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Add lines to `path` and sync them, in the place of a last one that a crash cut short."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        if file.read() not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write("".join(f"{line}\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())
    if not end:  # a new file's name lasts once its folder is synced
        _sync_folder(path.parent)


def append(path: Path, parts: Iterable[bytes]) -> int:
    """Add `parts` to `path` and sync them; where the first one begins."""
    with path.open("ab") as file:
        start = file.seek(0, os.SEEK_END)
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    if not start:
        _sync_folder(path.parent)
    return start


def whole_lines(path: Path) -> list[str]:
    """The complete lines of `path`; none when it does not exist."""
    if not path.exists():
        return []
    return [line.decode() for line in path.read_bytes().split(b"\n")[:-1]]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; ConfigurationError when another one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        if not _locked(lock):
            raise ConfigurationError(f"{folder} is in use by another process: wait for it")
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _SiteRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1]
    charged: Annotated[int, Meta(ge=0)]
    last_round: Annotated[int, Meta(ge=0)]
    promise: str = ""
    entered: Annotated[int, Meta(ge=0)] = 0
    released: dict[str, Annotated[int, Meta(ge=1)]] = msgspec.field(default_factory=dict)


class SiteStore:
    """What a site must never forget: the rounds it was charged for and the last one it entered.

    Reading needs no more than the folder. Who charges binds the store first. own: where the site
    keeps what nobody else may read; by default the same folder. private: where its secrets of this
    run are, if it keeps any; by default below the folder.
    """

    def __init__(self, folder: Path, own: Path | None = None, private: Path | None = None) -> None:
        self._path = folder / "site.json"
        self._own = own or folder
        self._private = private or folder / "own"
        self._record = read(self._path, _SiteRecord) or _SiteRecord(1, 0, 0)
        self._lock: IO[str] | None = None

    def bind(self, promise: str) -> None:
        """Hold the store for this process, under one promise (experiment and plan) for ever.

        Waits some seconds for a process that is ending, such as a worker whose engine was killed.
        Raises ConfigurationError when another process keeps it, or rounds were charged under
        another promise: their cost would be told wrongly.
        """
        folder = self._path.parent
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / ".lock").open("w")
        end = time.monotonic() + LOCK_SECONDS
        while not _locked(self._lock):
            if time.monotonic() > end:
                raise ConfigurationError(f"{folder} is in use by another process: wait for it")
            time.sleep(0.05)
        self._record = read(self._path, _SiteRecord) or _SiteRecord(1, 0, 0)
        charged = self.charged + sum(self._record.released.values())
        if charged and self._record.promise != promise:
            raise ConfigurationError(
                f"{self._path}: {charged} rounds were charged under another experiment or "
                "plan: put experiment.toml back as it was, or start a new run"
            )
        self._record = msgspec.structs.replace(self._record, promise=promise)

    def close(self) -> None:
        """Let another process bind the store."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def private(self) -> Path:
        """The folder of what is the site's own secret in this run; it need not exist."""
        return self._private

    @property
    def models(self) -> Path:
        """The folder of the site's own copies of the model, under reveal = "sites"."""
        return self._path.parent / "models"

    @property
    def charged(self) -> int:
        """Rounds of training charged so far, aborted ones included."""
        return self._record.charged

    def released(self, name: str) -> int:
        """How often another release than a round of training was charged, aborted ones included."""
        return self._record.released.get(name, 0)

    @property
    def last_charged(self) -> int:
        """The highest round number that was charged."""
        return self._record.last_round

    @property
    def last_round(self) -> int:
        """The highest round number that was entered or charged."""
        return max(self._record.entered, self._record.last_round)

    def enter(self, round_number: int) -> None:
        """Use up a round number, durably: a site that restarts takes no part in that round again.

        So it signs no second list of survivors in a round, and trains for it once.
        """
        if round_number < self.last_round:
            raise ValueError(f"round {round_number} does not follow round {self.last_round}")
        if self._record.entered != round_number:
            self._put(msgspec.structs.replace(self._record, entered=round_number))

    def charge(self, round_number: int, release: str = "") -> None:
        """Charge one round, durably, before anything that depends on it is computed.

        release: the name of what else than training the round is for.
        """
        if round_number <= self.last_charged:
            raise ValueError(f"round {round_number} does not follow round {self.last_charged}")
        if release:
            counted = {**self._record.released, release: self.released(release) + 1}
            record = msgspec.structs.replace(self._record, released=counted)
        else:
            record = msgspec.structs.replace(self._record, charged=self.charged + 1)
        self._put(msgspec.structs.replace(record, last_round=round_number))

    def keep_figures(self, update: int, figures: Mapping[str, float]) -> None:
        """Keep the site's own test figures of an update: they are exact, for its own people."""
        self._own.mkdir(parents=True, exist_ok=True)
        path = self._own / "figures.jsonl"
        path.touch(mode=0o600)
        told = {"run": self._path.parents[2].name, "update": update, "figures": figures}
        append_line(path, msgspec.json.encode(told).decode())

    def _put(self, record: _SiteRecord) -> None:
        write(self._path, msgspec.json.encode(record))
        self._record = record


class _ServerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1]
    last_round: Annotated[int, Meta(ge=0)]
    run: Annotated[str, Meta(pattern=r"\A([0-9a-f]{32})?\Z")] = ""


class ServerStore:
    """What a server must never forget: the last round number it began, and the run's name."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "server.json"
        self._record = read(self._path, _ServerRecord) or _ServerRecord(1, 0)

    @property
    def last_round(self) -> int:
        """The highest round number that was begun; numbers only grow."""
        return self._record.last_round

    @property
    def name(self) -> str:
        """What this run is called, hexadecimal; empty where no site was ever asked."""
        return self._record.run

    def begin(self, after: int = 0) -> int:
        """The next round number, above `after` too, durable before it is used."""
        self._put(msgspec.structs.replace(self._record, last_round=max(self.last_round, after) + 1))
        return self.last_round

    def run(self, randomness: Randomness) -> bytes:
        """What this run is called, for ever: 16 bytes, drawn when it is first asked for."""
        if not self._record.run:
            self._put(msgspec.structs.replace(self._record, run=randomness(16).hex()))
        return bytes.fromhex(self._record.run)

    def _put(self, record: _ServerRecord) -> None:
        write(self._path, msgspec.json.encode(record))
        self._record = record


def read(path: Path, kind: type[_Record]) -> _Record | None:
    """The record in the JSON file `path`; None where there is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise CorruptStoreError(f"{path} is damaged: {error}; restore it from a backup") from None
