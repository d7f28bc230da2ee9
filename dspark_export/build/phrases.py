"""The corpus of a bundle: phrases of what its target says, for the ``store`` drafter.

The target answers prompts that it makes up itself, or the user's, with the bundle's own continuous batching and
speculation. What counts is what it held likely at every place, not only what came. The corpus of a number of prompts
follows from the seed; how many prompts fit into a given time does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_export.bundle.writer import BundleWriter
from dspark_export.prompts.answers import answer, self_prompts
from dspark_export.prompts.texts import encode
from dspark_runtime import Bundle, DraftRequest, SamplingParams
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import DrafterEntry, Manifest, PhraseFacts
from dspark_runtime.drafters.store import StoreDrafter
from dspark_runtime.errors import UsageError
from dspark_runtime.phrases.compiled import phrase_forms
from dspark_runtime.phrases.store import PhraseOptions, PhraseStore, bundle_corpus, write_corpus
from dspark_runtime.phrases.tables import CORPUS, ORDERS, UNIT, Follower, GrowingPhrases, PackedPhrases
from dspark_runtime.speculation.tree import TokenTree

CORPUS_FILE = "phrases/corpus.npz"
STORE, OWN = "store", "its own"
SECONDS = 120.0
"""What the build takes for the corpus by default."""
MOST_TOKENS = 200_000
ANSWER_TOKENS = 256
_PART = 64  # prompts made and answered at a time
_HELD_OUT = 10  # one text in this many is measured on
_MEASURED = 40  # texts of those, at most
_DRAFTS = 7  # of a proposal when the gain is measured
_SETTINGS = (SamplingParams(), SamplingParams(temperature=0.7))


@dataclass(frozen=True)
class Told:
    """A text: its tokens, where the answer begins, and what was likely at each of its places."""

    tokens: Sequence[int]
    start: int
    followers: Sequence[Sequence[Follower]]

    def count(self, table: GrowingPhrases) -> None:
        """Enter the answer into a table."""
        for place, weights in enumerate(self.followers, self.start):
            table.add(self.tokens[max(0, place - ORDERS[CORPUS]) : place], weights)


@dataclass(frozen=True)
class Gain:
    """Tokens of a round, the target's own included, on texts held out: without a corpus, and with that of the others.

    ``texts``: how many were held out. A round verifies the seven most likely tokens.
    """

    texts: int
    without: float
    with_corpus: float


@dataclass(frozen=True)
class Corpus:
    """Phrases, where they are from, and what they bring (None: too few texts to hold any out)."""

    packed: PackedPhrases
    facts: PhraseFacts
    gain: Gain | None


class _Listener(PhraseStore):
    """A store that also keeps what it is told, by text."""

    def __init__(self, vocab_size: int, corpus: PackedPhrases | None) -> None:
        super().__init__(vocab_size, corpus, PhraseOptions(history=10_000_000))
        self.told: dict[tuple[int, ...], Told] = {}

    def remember(self, scope: str, tokens: Sequence[int], start: int, followers: Sequence[Sequence[Follower]]) -> None:
        """Keep the text, and let those after it be drafted from it."""
        self.told[tuple(tokens)] = Told(tuple(tokens), start, tuple(followers))
        super().remember(scope, tokens, start, followers)


def own_texts(
    bundle: Bundle,
    count: int | None,
    seed: int = 0,
    seconds: float = SECONDS,
    on_text: Callable[[], None] = lambda: None,
) -> list[Told]:
    """What the target answers to ``count`` prompts of its own; None: to as many as fit into ``seconds``.

    Raises:
        UsageError: the bundle has no tokenizer.
    """
    ends, texts, seen, tokens = time.monotonic() + seconds, list[Told](), set[str](), 0
    listener = _Listener(bundle.manifest.model.vocab_size, None)
    first = 0
    while first < count if count is not None else time.monotonic() < ends and tokens < MOST_TOKENS:
        last = first + _PART if count is None else min(first + _PART, count)
        prompts = []
        for text in self_prompts(bundle, last, seed, first=first, speculate=STORE):
            if text and text not in seen:
                seen.add(text)
                prompts.append(encode(bundle, text))
        for told in _answers(bundle.with_phrases(listener), prompts, seed):
            texts.append(told)
            tokens += len(told.followers)
            on_text()
            if count is None and time.monotonic() > ends:
                break
        first = last
    return texts


def answered_texts(
    bundle: Bundle, prompts: Sequence[str], seed: int = 0, on_text: Callable[[], None] = lambda: None
) -> list[Told]:
    """What the target answers to the user's prompts."""
    listener = _Listener(bundle.manifest.model.vocab_size, bundle_corpus(bundle.files))
    texts = []
    for told in _answers(bundle.with_phrases(listener), [encode(bundle, prompt) for prompt in prompts], seed):
        texts.append(told)
        on_text()
    return texts


def given_texts(bundle: Bundle, pairs: Sequence[tuple[str, str]]) -> list[Told]:
    """Answers that were written before, with their prompts: each token counts alone."""
    texts = []
    for prompt, response in pairs:
        start, ids = encode(bundle, prompt), bundle.codec.encode(response)
        texts.append(Told((*start, *ids), len(start), tuple(((token, UNIT),) for token in ids)))
    return texts


def _answers(bundle: Bundle, prompts: Sequence[Sequence[int]], seed: int) -> Iterator[Told]:
    listener = bundle.phrases
    assert isinstance(listener, _Listener)
    room = bundle.limits.positions - 2
    prompts = [prompt for prompt in prompts if len(prompt) < room]
    settings = [_SETTINGS[number % len(_SETTINGS)] for number in range(len(prompts))]
    if not prompts:
        return
    for response in answer(bundle, prompts, settings, max_new_tokens=ANSWER_TOKENS, seed=seed, speculate=STORE):
        yield listener.told.pop((*response.prompt, *response.response))


def corpus_of(texts: Sequence[Told], vocab_size: int, origin: str, before: Corpus | None = None) -> Corpus:
    """The corpus of ``texts``, on top of the one there was.

    Raises:
        UsageError: there is no text.
    """
    if not texts:
        raise UsageError("there is no text to make phrases of; give prompts or responses")
    packed = _counted(texts, before)
    facts = PhraseFacts(
        file=CORPUS_FILE,
        contexts=len(packed),
        texts=len(texts) + (before.facts.texts if before else 0),
        tokens=sum(len(told.followers) for told in texts) + (before.facts.tokens if before else 0),
        origin=origin if before is None or before.facts.origin == origin else f"{before.facts.origin}, {origin}",
    )
    return Corpus(packed, facts, _gain(texts, vocab_size, before))


def _counted(texts: Sequence[Told], before: Corpus | None) -> PackedPhrases:
    table = phrase_forms().table(ORDERS[CORPUS], None)
    if before is not None:
        table.load(before.packed)
    for told in texts:
        told.count(table)
    return table.packed().pruned()


def _gain(texts: Sequence[Told], vocab_size: int, before: Corpus | None) -> Gain | None:
    held_out = texts[::_HELD_OUT][:_MEASURED]
    others = [told for place, told in enumerate(texts) if place % _HELD_OUT]
    if not others:
        return None
    known = before.packed if before else None, _counted(others, before)
    alone = PhraseOptions(history=0)  # none of the texts held out is known to the others
    lengths = [accepted_length(PhraseStore(vocab_size, packed, alone), held_out) for packed in known]
    return Gain(len(held_out), *lengths)


def accepted_length(store: PhraseStore, texts: Sequence[Told], drafts: int = _DRAFTS) -> float:
    """Tokens of a round if the store drafted these texts from their prompts, one after the other; it learns them."""
    rounds = tokens = 0
    for number, told in enumerate(texts):
        drafter = StoreDrafter(store)
        drafter.begin(number, told.tokens[: told.start])
        place = told.start
        while place < len(told.tokens):
            known = list(told.tokens[:place])
            draft = drafter.propose([DraftRequest(number, 0, known, drafts)])[0]
            end = place + (0 if draft is None else _agreed(draft.tree, told.tokens[place:-1]))
            drafter.commit(number, told.tokens[place : end + 1])
            rounds, tokens, place = rounds + 1, tokens + end + 1 - place, end + 1
        drafter.end(number)
    return tokens / rounds if rounds else 1.0


def _agreed(tree: TokenTree, tokens: Sequence[int]) -> int:
    """How many of ``tokens`` are a path of the tree, from the anchor on."""
    row = 0
    for count, token in enumerate(tokens):
        row = tree.child(row, token)
        if row < 0:
            return count
    return len(tokens)


def known_corpus(files: BundleFiles) -> Corpus | None:
    """The corpus of a bundle; None if it has none."""
    packed = bundle_corpus(files)
    facts = next((entry.phrases for entry in files.manifest.drafters if entry.phrases is not None), None)
    return None if packed is None or facts is None else Corpus(packed, facts, None)


def with_corpus(manifest: Manifest, facts: PhraseFacts) -> Manifest:
    """The manifest of a bundle that has this corpus."""
    entry = DrafterEntry(name=STORE, kind="store", phrases=facts)
    others = [drafter for drafter in manifest.drafters if drafter.kind != "store"]
    place = next((i for i, drafter in enumerate(manifest.drafters) if drafter.kind == "store"), len(others))
    return manifest.model_copy(update={"drafters": (*others[:place], entry, *others[place:])})


def add_corpus(bundle: Path, made: Corpus) -> Manifest:
    """Replace a bundle by a copy with this corpus. The bundle stays as it was if anything fails.

    Raises:
        BundleError: the bundle is damaged, or cannot be written.
    """
    files = BundleFiles.open(bundle)
    with BundleWriter(files.root, overwrite=True) as writer:
        writer.copy(files)
        write_corpus(writer.dir / CORPUS_FILE, made.packed)
        return writer.commit(with_corpus(files.manifest, made.facts))
