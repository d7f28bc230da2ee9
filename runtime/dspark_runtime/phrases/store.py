"""What an opened bundle knows of phrases: its corpus, the history of its requests, and what classes are worth.

A store is shared by all calls and services of a bundle, and safe in threads. It knows tokens, not texts, but they can
be read back from it: the history of one scope (an API key) is not looked at for another one, unless it is asked for,
and a saved store is as confidential as the requests were.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from dspark_runtime.arguments import whole
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.errors import DamagedBundle, IncompatibleBundle, UsageError
from dspark_runtime.phrases.compiled import PhraseForms, phrase_forms
from dspark_runtime.phrases.tables import (
    BUCKETS,
    CENTRES,
    CLASSES,
    HISTORY,
    ORDERS,
    TEXT,
    Follower,
    GrowingPhrases,
    Grown,
    PackedPhrases,
    Shape,
)

MOST_SCOPES = 64
DEFAULT_HISTORY = 131_072
_PRIOR_WEIGHT, _PRIOR_SHARE = 6.0, 0.6
_MOST_SEEN = 400.0
_FORMAT = 1
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, BadZipFile)


@dataclass(frozen=True)
class PhraseOptions:
    """What is remembered of requests.

    Args:
        history: most contexts that are kept of the texts written so far, about two for each token; the oldest go.
            0 remembers nothing.
        shared: requests of all scopes (API keys) draft from one history. Texts stay the same, but how fast one comes
            tells what others were told.
        file: saved phrases to begin with, and where :meth:`PhraseStore.save` writes them; it need not exist yet.

    Raises:
        UsageError: a value outside its range.
    """

    history: int = DEFAULT_HISTORY
    shared: bool = False
    file: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "history", whole("history", self.history, 0, 100_000_000))
        if self.file is not None and not isinstance(self.file, str | os.PathLike):
            raise UsageError(f"the file of phrases is given by its path, not {self.file!r:.40}")


class PhraseStore:
    """See the module's text.

    Args:
        vocab_size: of the target.
        corpus: phrases of the bundle, None if it has none.
        options: what is remembered.
        tokenizer: digest of the tokenizer, by which a saved store is told from one of another model.
        forms: implementation of the tables; None for the best there is.

    Raises:
        DamagedBundle: the saved store cannot be read.
        IncompatibleBundle: it belongs to another model.
    """

    def __init__(
        self,
        vocab_size: int,
        corpus: PackedPhrases | None = None,
        options: PhraseOptions | None = None,
        tokenizer: str = "",
        forms: PhraseForms | None = None,
    ) -> None:
        self.options = options or PhraseOptions()
        self._vocab_size, self._tokenizer = vocab_size, tokenizer
        self._forms = forms or phrase_forms()
        self._corpus = None if corpus is None else self._forms.stored(corpus)
        self._packed_corpus = corpus
        self._lock = threading.Lock()
        self._histories: OrderedDict[str, GrowingPhrases] = OrderedDict()
        self._seen = [[0.0, 0.0] for _ in range(CLASSES)]
        self._rates = self._forms.rates([_rate(kind, 0.0, 0.0) for kind in range(CLASSES)])
        if self.options.file is not None and Path(self.options.file).exists():
            self._open(Path(self.options.file))

    def fresh(self, options: PhraseOptions | None = None) -> PhraseStore:
        """A store with the same corpus that has learned nothing, or what the file of ``options`` has.

        Without ``options`` it has those of this one, and no file.

        Raises:
            DamagedBundle: the saved store cannot be read.
            IncompatibleBundle: it belongs to another model.
        """
        options = options or PhraseOptions(self.options.history, self.options.shared)
        return PhraseStore(self._vocab_size, self._packed_corpus, options, self._tokenizer, self._forms)

    def text(self) -> GrowingPhrases:
        """An empty table for the text of one request."""
        return self._forms.table(ORDERS[TEXT], None)

    def rate(self, kind: int) -> float:
        """Chance that a token of this class is accepted, given that its parent is."""
        return self._rates[kind]

    def grow(self, scope: str, text: GrowingPhrases, context: Sequence[int], shape: Shape) -> Grown:
        """The likeliest tree behind ``context``, see :func:`dspark_runtime.phrases.tables.grow`."""
        with self._lock:
            history = self._histories.get(self._scope(scope))
            return self._forms.grow((self._corpus, history, text), self._rates, context, shape)

    def learn(self, kinds: Sequence[tuple[int, bool]]) -> None:
        """Count whether a token of each of these classes was the one that came."""
        with self._lock:
            for kind, hit in kinds:
                seen = self._seen[kind]
                if seen[1] >= _MOST_SEEN:
                    seen[0] *= 0.5
                    seen[1] *= 0.5
                seen[0] += hit
                seen[1] += 1.0
                self._rates[kind] = _rate(kind, *seen)  # type: ignore[index]

    def remember(self, scope: str, tokens: Sequence[int], start: int, followers: Sequence[Sequence[Follower]]) -> None:
        """Add a text to the history of ``scope``.

        ``followers[i]`` came, or might have come, after ``tokens[: start + i]``.
        """
        if not self.options.history or not followers:
            return
        scope = self._scope(scope)
        with self._lock:
            history = self._histories.get(scope)
            if history is None:
                history = self._histories[scope] = self._forms.table(ORDERS[HISTORY], self.options.history)
            self._histories.move_to_end(scope)
            while len(self._histories) > MOST_SCOPES:
                self._histories.popitem(last=False)
            for place, weights in enumerate(followers, start):
                history.add(tokens[max(0, place - ORDERS[HISTORY]) : place], weights)

    def forget(self) -> None:
        """Drop all histories; what classes are worth stays learned."""
        with self._lock:
            self._histories.clear()

    def contexts(self) -> int:
        """Contexts of all histories together."""
        with self._lock:
            return sum(map(len, self._histories.values()))

    def _scope(self, scope: str) -> str:
        return "" if self.options.shared else scope

    # On disk -------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write the histories and the learned rates, whole or not at all; by default to the file of the options.

        Only its owner may read the file.

        Raises:
            UsageError: there is no such file in the options.
            OSError: it cannot be written.
        """
        given = path if path is not None else self.options.file
        if given is None:
            raise UsageError("nowhere to save the phrases: give a path, or open the bundle with a file for them")
        with self._lock:
            seen = np.array(self._seen)
            parts = {scope: history.packed() for scope, history in self._histories.items()}
        arrays: dict[str, np.ndarray] = {
            "format": np.array(_FORMAT),
            "vocab_size": np.array(self._vocab_size),
            "tokenizer": np.array(self._tokenizer),
            "scopes": np.array(list(parts), dtype=np.str_),
            "seen": seen,
        }
        for number, packed in enumerate(parts.values()):
            arrays |= {f"{number}.{name}": getattr(packed, name) for name, _ in PackedPhrases.FIELDS}
        return _write(Path(given), arrays)

    def _open(self, path: Path) -> None:
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            if int(arrays["format"]) != _FORMAT:
                raise IncompatibleBundle(f"{path} has phrases of another version; remove it to begin anew")
            same = int(arrays["vocab_size"]) == self._vocab_size and str(arrays["tokenizer"]) == self._tokenizer
            if not same:
                raise IncompatibleBundle(f"{path} has phrases of a model with another vocabulary; give another file")
            seen = arrays["seen"]
            if seen.shape != (CLASSES, 2) or not np.isfinite(seen).all() or (seen < 0).any():
                raise DamagedBundle(f"{path} is damaged; remove it to begin anew")
            parts = {
                str(scope): read_packed(arrays, f"{number}.", self._vocab_size, str(path))
                for number, scope in enumerate(arrays["scopes"].tolist())
            }
        except _UNREADABLE as error:
            raise DamagedBundle(f"{path} holds no phrases ({error}); remove it to begin anew") from error
        self._seen = seen.tolist()
        self._rates = self._forms.rates([_rate(kind, *counts) for kind, counts in enumerate(self._seen)])
        if not self.options.history:
            return
        for scope, packed in list(parts.items())[-MOST_SCOPES:]:
            key = self._scope(scope)
            if key not in self._histories:
                self._histories[key] = self._forms.table(ORDERS[HISTORY], self.options.history)
            self._histories[key].load(packed)


def read_packed(arrays: dict[str, np.ndarray], prefix: str, vocab_size: int, where: str) -> PackedPhrases:
    """Packed phrases from named arrays, checked; KeyError where one is missing, DamagedBundle if they do not fit."""
    fields = [np.ascontiguousarray(arrays[f"{prefix}{name}"]) for name, _ in PackedPhrases.FIELDS]
    return PackedPhrases(*fields).checked(vocab_size, where)


def read_corpus(path: Path, vocab_size: int) -> PackedPhrases:
    """Phrases of a bundle; DamagedBundle if the file holds something else."""
    try:
        with np.load(path) as file:
            return read_packed({name: file[name] for name in file.files}, "", vocab_size, str(path))
    except _UNREADABLE as error:
        raise DamagedBundle(f"{path} holds no phrases ({error}); build the bundle again") from error


def bundle_corpus(files: BundleFiles) -> PackedPhrases | None:
    """The corpus of a bundle; None if it has none.

    Raises:
        DamagedBundle: its file holds something else.
    """
    facts = next((entry.phrases for entry in files.manifest.drafters if entry.phrases is not None), None)
    return None if facts is None else read_corpus(files.path(facts.file), files.manifest.model.vocab_size)


def write_corpus(path: Path, packed: PackedPhrases) -> Path:
    """Write phrases of a bundle that is being made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, **{name: getattr(packed, name) for name, _ in PackedPhrases.FIELDS})
    return path


def _write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".npz")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return path


def _rate(kind: int, hits: float, seen: float) -> float:
    expected = _PRIOR_SHARE * CENTRES[kind % BUCKETS]
    return (hits + _PRIOR_WEIGHT * expected) / (seen + _PRIOR_WEIGHT)
