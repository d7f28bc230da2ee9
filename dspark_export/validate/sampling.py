"""Do the rules of verification emit the target's own tokens? The runtime's rules and the bundle's ``verify`` graph on
real logits, against a walk written out plainly; sampled text against plain sampled text; rejection by distribution."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from dspark_export.validate.checks import Check
from dspark_export.validate.probe import Probe, branching
from dspark_export.validate.references import session
from dspark_runtime import Bundle
from dspark_runtime.arrays import FloatArray
from dspark_runtime.bundle.contract import VERIFY, VERIFY_INPUTS, VERIFY_OUTPUTS
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.errors import DsparkError
from dspark_runtime.speculation.sampling import Sampler, SamplingParams, distribution
from dspark_runtime.speculation.tree import TokenTree
from dspark_runtime.speculation.verify import verify_chain, verify_tree

_DRAWS = 3000
_CHANCE = 1e-5  # probability of a false alarm
_SETTINGS = (SamplingParams(), SamplingParams(0.8), SamplingParams(1.0, top_k=20, top_p=0.9, min_p=0.01))
_CHAIN = 3


def real_rows(bundle: Bundle, texts: Sequence[Sequence[int]]) -> list[tuple[TokenTree, FloatArray, int]]:
    """Trees after real texts with their logits [rows, vocab] and the position of their anchor."""
    found = []
    for number, ids in enumerate(texts):
        at = len(ids) - 8
        tree, _ = branching(ids, at, bundle.limits.vocab_size, number)
        probe = Probe(bundle, [ids[:at]])
        logits = probe.run_trees([tree])[0]
        found.append((tree, logits, at))
        # The same once more with the target's own choices as drafts, so that whole paths are accepted.
        likely = [int(t) for t in np.argsort(-logits[0])[:2]]
        own = TokenTree([tree.tokens[0], likely[1], likely[0]], [-1, 0, 0])
        second = int(np.argmax(probe.run_trees([own])[0][2]))
        own = TokenTree([*own.tokens, second], [*own.parents, 2])
        found.append((own, probe.run_trees([own])[0], at))
    return found


def check_rules(bundle: Bundle, texts: Sequence[Sequence[int]]) -> Check:
    """Accepted rows and emitted tokens of :func:`verify_tree` and of the ``verify`` graph."""
    began = time.perf_counter()
    cases = real_rows(bundle, texts)
    wrong: dict[str, str] = {}
    running = _verify_session(bundle.files)
    count = 0
    for params in _SETTINGS:
        for seed, (tree, logits, start) in enumerate(cases):
            count += 1
            expected = _plain_walk(tree, logits, Sampler(params, seed, 1), start)
            sampler = Sampler(params, seed, 1)
            verdict = verify_tree(tree, logits, sampler.draw, start)
            if (list(verdict.path), list(verdict.tokens)) != expected:
                told = _told(expected, verdict.path, verdict.tokens)
                wrong.setdefault("dspark_runtime.speculation.verify.verify_tree", told)
            if running is not None:
                path, emitted = _by_graph(running, tree, logits, params, Sampler(params, seed, 1), start)
                if (path, emitted) != expected:
                    wrong.setdefault("the verify graph", _told(expected, path, emitted))
    where = ", ".join(wrong)
    return Check(
        id="losslessness.rules",
        family="losslessness",
        title="Verification follows the target's own choices",
        status="failed" if wrong else "passed",
        measured=float(len(wrong)),
        limit=0.0,
        unit="forms of the rule that differ",
        where=where,
        message="" if not wrong else "; ".join(f"{name} {how}" for name, how in wrong.items()),
        seconds=time.perf_counter() - began,
        data={"cases": count, "graph": running is not None},
    )


def _plain_walk(tree: TokenTree, logits: FloatArray, sampler: Sampler, start: int) -> tuple[list[int], list[int]]:
    """The rule written out: draw, look for that token among the children, go on or stop."""
    path, tokens = [0], []
    while True:
        row = path[-1]
        chosen = sampler.draw(logits[row], start + len(path))
        tokens.append(chosen)
        following = [i for i, p in enumerate(tree.parents) if p == row and tree.tokens[i] == chosen]
        if not following:
            return path, tokens
        path.append(following[0])


def _told(expected: tuple[list[int], list[int]], path: Sequence[int], tokens: Sequence[int]) -> str:
    return (
        f"accepts rows {list(path)} and emits {list(tokens)} where the target's choices accept {expected[0]} and emit "
        f"{expected[1]}"
    )


def _verify_session(files: BundleFiles) -> ort.InferenceSession | None:
    return session(files.path(files.graph(VERIFY).file), 1) if files.has_graph(VERIFY) else None


def _by_graph(
    running: ort.InferenceSession,
    tree: TokenTree,
    logits: FloatArray,
    params: SamplingParams,
    sampler: Sampler,
    start: int,
) -> tuple[list[int], list[int]]:
    rows = len(tree)
    depths = np.array(tree.depths)
    draws = sampler.draft_uniforms(start + 1, int(depths.max()) + 1, coupled=True)
    sampling = (params.temperature, params.top_k, params.top_p, params.min_p)
    given = (
        logits[None],
        np.array([tree.tokens]),
        np.array(tree.ancestors())[None],
        draws[depths].reshape(1, rows),
        *(np.array([value]) for value in sampling),
    )
    found = running.run(
        [spec.name for spec in VERIFY_OUTPUTS],
        {spec.name: array.astype(spec.dtype) for spec, array in zip(VERIFY_INPUTS, given, strict=True)},
    )
    kept = int(found[2][0]) + 1
    return [int(row) for row in found[0][0][:kept]], [int(token) for token in found[1][0][:kept]]


def check_rejection(bundle: Bundle, texts: Sequence[Sequence[int]]) -> Check:
    """First tokens that rejection sampling emits, drafted from another distribution, against the target's.

    Pearson's test over the most likely tokens and the rest together.
    """
    began = time.perf_counter()
    params = SamplingParams(1.0)
    ids = texts[0]
    probe = Probe(bundle, [ids[:-4]])
    chain = TokenTree.chain(ids[-4], ids[-3:])
    logits = probe.run_trees([chain])[0]
    target = distribution(logits[0], params)
    # A drafter that knows less: flatter, and mixed with what comes next in the text.
    drafts = np.stack(
        [
            0.7 * distribution(logits[row] / 1.6, params) + 0.3 * distribution(logits[row + 1], params)
            for row in range(_CHAIN)
        ]
    ).astype(np.float32)
    random = np.random.default_rng(5)
    wide = drafts.astype(np.float64)
    drawn = np.stack([random.choice(len(q), _DRAWS, p=q / q.sum()) for q in wide], 1)
    likely = np.argsort(-target)[:24]
    place = {int(token): i for i, token in enumerate(likely)}
    seen = np.zeros(len(likely) + 1)
    for seed, tokens in enumerate(drawn.tolist()):
        verdict = verify_chain(tokens, drafts, logits, Sampler(params, seed, 2), len(ids) - 4)
        seen[place.get(verdict.tokens[0], len(likely))] += 1
    expected = np.append(target[likely], max(1e-9, 1.0 - float(target[likely].sum()))) * _DRAWS
    enough = expected >= 5
    joined = [*zip(seen[enough], expected[enough], strict=True), (seen[~enough].sum(), expected[~enough].sum())]
    joined = [(s, e) for s, e in joined if e > 1]
    statistic = float(sum((s - e) ** 2 / e for s, e in joined))
    limit = _chi_square_bound(len(joined) - 1)
    distance = 0.5 * float(np.abs(seen / _DRAWS - expected / _DRAWS).sum())
    passed = statistic <= limit
    return Check(
        id="losslessness.rejection",
        family="losslessness",
        title="Rejection sampling has the target's distribution",
        status="passed" if passed else "failed",
        measured=statistic,
        limit=limit,
        unit=f"chi-square of {_DRAWS} draws",
        where="" if passed else "dspark_runtime.speculation.verify.verify_chain",
        message=""
        if passed
        else "Tokens are emitted too often or too rarely: look at how drafts are accepted and at "
        "what is drawn after a rejection.",
        seconds=time.perf_counter() - began,
        data={"total_variation": distance, "cells": len(joined)},
    )


def _chi_square_bound(freedom: int) -> float:
    """Value a chi-square variable passes with a chance of about 1e-5 (Wilson and Hilferty 1931)."""
    z = 4.265  # of the normal distribution, for _CHANCE
    freedom = max(1, freedom)
    return float(freedom * (1 - 2 / (9 * freedom) + z * np.sqrt(2 / (9 * freedom))) ** 3)


def check_sampled(bundle: Bundle, prompts: Sequence[Sequence[int]], mode: str, max_new_tokens: int) -> Check:
    """Speculative text of a temperature and seed against the plain one: the same tokens, in the exact setting."""
    began = time.perf_counter()
    exact = bundle if bundle.exact else Bundle.open(bundle.files.root, exact=True, verify_digests=False)
    message, where, differing = "", "", 0
    try:
        for number, ids in enumerate(prompts):
            plain, mine = (
                exact.with_fresh_schedule()
                .generate(list(ids), speculate=m, max_new_tokens=max_new_tokens, temperature=0.8, top_p=0.95, seed=11)
                .tokens
                for m in ("off", mode)
            )
            if plain != mine:
                differing += 1
                at = next((i for i, (a, b) in enumerate(zip(plain, mine, strict=False)) if a != b), 0)
                where = where or f"prompt {number}, token {at}"
    except DsparkError as error:
        message, where, differing = str(error), "the runtime", len(prompts)
    if differing and not message:
        message = f"{differing} of {len(prompts)} sampled texts leave the plain text of the same seed; first: {where}."
    return Check(
        id=f"losslessness.sampled.{mode}",
        family="losslessness",
        title=f"Sampled text of {mode} is plain sampled text",
        status="failed" if differing else "passed",
        measured=float(differing),
        limit=0.0,
        unit="texts that differ",
        where=where,
        message=message,
        seconds=time.perf_counter() - began,
    )
