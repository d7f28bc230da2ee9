"""Responses of a model in one file that lasts: packed token ids, and what they were made from.

========= ========== =======================================================================================
bytes      what
========= ========== =======================================================================================
8          magic      ``DSPKTXT1``
9 a record head       kind (1), bytes of the contents (4), their CRC-32 (4), little-endian
...        contents   kind 0, first and once: JSON, see :class:`Origin`; 1: a response, temperature (float32) and
                      length of the prompt (uint32), then token ids in 16 bits where the vocabulary allows that,
                      else in 32; 2: a prompt that the model wrote, UTF-8, deflated; 3: JSON of a prompt source
========= ========== =======================================================================================

The file grows by whole records and is synchronized as it grows. A run that was killed leaves at most a torn record at
the end, which the next one drops.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np

from dspark_export.prompts.answers import Response
from dspark_runtime.errors import BundleBusy, UsageError

MAGIC = b"DSPKTXT1"
_ORIGIN, _RESPONSE, _PROMPT, _SOURCE = range(4)
_HEAD, _BEFORE_IDS = struct.Struct("<BII"), struct.Struct("<fI")
_SYNC_BYTES = 1 << 16  # written between two synchronizations
_TORN_BYTES = 1 << 20  # the most that a killed run leaves of what it was writing


@dataclass(frozen=True)
class Origin:
    """What responses depend on beside their prompts.

    ``model``: its id; ``files``: SHA-256 of its checkpoint's files; ``tokenizer``: of ``tokenizer.json``;
    ``precision``: weights of the bundle that wrote; ``vocab_size``: of the model; ``seed``, ``temperatures``,
    ``max_new_tokens``: how texts were drawn.
    """

    model: str
    files: Mapping[str, str]
    tokenizer: str
    precision: str
    vocab_size: int
    seed: int = 0
    temperatures: tuple[float, ...] = (0.0,)
    max_new_tokens: int = 256


@dataclass
class _Contents:
    responses: list[Response] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)


class PackedResponses:
    """The responses of ``path``, and the file to add more to.

    Args:
        path: the file; it appears with the first record.
        origin: what new responses are made with; None to read only, which needs a file that is there.

    Raises:
        UsageError: no such file, another kind of file, a damaged one, or one of another origin.
        BundleBusy: another run adds to the file.
    """

    def __init__(self, path: Path, origin: Origin | None = None) -> None:
        self.path = path
        self._found = _Contents()
        self._file: BinaryIO | None = None
        self._guard: filelock.BaseFileLock | None = None
        self._unsynced = 0
        if origin is not None:
            self._lock(path)
        stored, end = self._read() if path.exists() or origin is None else (None, 0)
        if stored is None and origin is None:
            raise UsageError(f"{path} holds no responses yet; run the command that makes them again")
        self.origin = stored or origin
        assert self.origin is not None
        if origin is None:
            return
        if stored is not None and (changed := _differences(stored, origin)):
            self.close()
            raise UsageError(
                f"{path} holds responses made with other settings ({', '.join(changed)} differ): use those, or name "
                "another file"
            )
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.seek(0 if stored is None else end)
        self._file.truncate()
        if stored is None:
            self._file.write(MAGIC)
            self._append(_ORIGIN, json.dumps(asdict(origin)).encode())
            self.sync()

    # Contents ------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Response]:
        return iter(self._found.responses)

    def __len__(self) -> int:
        return len(self._found.responses)

    @property
    def own_prompts(self) -> list[str]:
        """Prompts that the model wrote, by number."""
        return list(self._found.prompts)

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Where prompts came from: a digest and how many there were, for each set that was ever asked."""
        return list(self._found.sources)

    # Growth --------------------------------------------------------------------------------------------------------

    def add(self, response: Response) -> None:
        """Add a response."""
        ids = np.asarray([*response.prompt, *response.response], self._id_type)
        self._append(_RESPONSE, _BEFORE_IDS.pack(response.temperature, len(response.prompt)) + ids.tobytes())
        self._found.responses.append(response)

    def add_prompt(self, text: str) -> None:
        """Add the next prompt that the model wrote."""
        self._append(_PROMPT, zlib.compress(text.encode("utf-8", "replace"), 9))
        self._found.prompts.append(text)

    def add_source(self, source: Mapping[str, Any]) -> None:
        """Say what prompts are about to be asked, unless the file says so already."""
        if dict(source) not in self._found.sources:
            self._append(_SOURCE, json.dumps(dict(source)).encode())
            self._found.sources.append(dict(source))

    def sync(self) -> None:
        """Bring what was added onto the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._unsynced = 0

    def close(self) -> None:
        """Synchronize and close; reading goes on."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None
        if self._guard is not None:
            self._guard.release()

    def __enter__(self) -> PackedResponses:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _id_type(self) -> str:
        assert self.origin is not None
        return "<u2" if self.origin.vocab_size <= 1 << 16 else "<u4"

    def _append(self, kind: int, contents: bytes) -> None:
        if self._file is None:
            raise ValueError(f"{self.path} was opened to read, or closed")
        self._file.write(_HEAD.pack(kind, len(contents), zlib.crc32(contents)) + contents)
        self._unsynced += len(contents)
        if self._unsynced >= _SYNC_BYTES:
            self.sync()

    def _lock(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._guard = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
        try:
            self._guard.acquire()
        except filelock.Timeout as error:
            raise BundleBusy(f"another run adds to {path}; wait until it ends, or name another file") from error

    # Reading -------------------------------------------------------------------------------------------------------

    def _read(self) -> tuple[Origin | None, int]:
        """The file's origin, None if not even that is complete, and where its last complete record ends."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read the responses {self.path}: {error.strerror or error}") from error
        if not MAGIC.startswith(data[: len(MAGIC)]):
            raise UsageError(f"{self.path} is not a file of packed responses")
        origin, at = None, len(MAGIC)
        for kind, contents, end in _records(data, self.path):
            if kind == _ORIGIN:
                origin = self.origin = _origin(contents, self.path)
            elif kind == _RESPONSE:
                temperature, prompt = _BEFORE_IDS.unpack_from(contents)
                ids = np.frombuffer(contents, self._id_type, offset=_BEFORE_IDS.size).tolist()
                temperature = round(temperature, 6)  # it was a float64 before it was packed
                self._found.responses.append(Response(tuple(ids[:prompt]), tuple(ids[prompt:]), temperature))
            elif kind == _PROMPT:
                self._found.prompts.append(zlib.decompress(contents).decode("utf-8"))
            elif kind == _SOURCE:
                self._found.sources.append(json.loads(bytes(contents)))
            else:
                raise UsageError(f"{self.path} has records of kind {kind}, of a newer version; update dspark-export")
            at = end
        return origin, at


def is_packed(path: Path) -> bool:
    """Whether a file begins as one of packed responses does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _records(data: bytes, path: Path) -> Iterator[tuple[int, memoryview, int]]:
    """(kind, contents, where it ends) of every complete record."""
    at, view = len(MAGIC), memoryview(data)
    while at + _HEAD.size <= len(data):
        kind, size, checksum = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + size
        contents = view[at + _HEAD.size : end]
        if end > len(data) or (end == len(data) and zlib.crc32(contents) != checksum):
            if len(data) - at > _TORN_BYTES:
                raise _damaged(path, at)
            return
        if zlib.crc32(contents) != checksum:
            raise _damaged(path, at)
        if (at == len(MAGIC)) != (kind == _ORIGIN):
            raise UsageError(f"{path} does not begin with what its responses were made from; make it again")
        yield kind, contents, end
        at = end


def _damaged(path: Path, at: int) -> UsageError:
    return UsageError(f"{path} is damaged at byte {at}: restore it from a copy, or delete it and make it again")


def _origin(contents: memoryview, path: Path) -> Origin:
    stored = json.loads(bytes(contents))
    if unknown := {*stored} - {item.name for item in fields(Origin)}:
        raise UsageError(f"{path} says {', '.join(sorted(unknown))}, of a newer version; update dspark-export")
    return Origin(**{**stored, "temperatures": tuple(stored["temperatures"])})


def _differences(stored: Origin, origin: Origin) -> list[str]:
    return [item.name for item in fields(Origin) if getattr(stored, item.name) != getattr(origin, item.name)]
