"""Trees made from the likely texts a block drafter's graph gives."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dspark_runtime.drafters.beams import BeamLayout
from dspark_runtime.speculation.tree import TokenTree


def grown(drafts: int, beams: int, candidates: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes as a graph gives them: tokens, probabilities given the nodes above, parents."""
    random = np.random.default_rng(seed)
    tokens: list[int] = []
    probs: list[float] = []
    parents: list[int] = []
    texts = [(1.0, -1)]
    for _ in range(drafts):
        further = []
        for reach, above in texts:
            chances = np.sort(random.dirichlet(np.full(candidates + 2, 0.5)))[::-1][:candidates].astype(np.float32)
            for token, chance in zip(random.permutation(50)[:candidates].tolist(), chances.tolist(), strict=True):
                further.append((reach * chance, len(tokens)))
                tokens.append(token)
                probs.append(chance)
                parents.append(above)
        texts = sorted(further, key=lambda text: -text[0])[:beams]
    return np.array(tokens), np.array(probs, np.float32), np.array(parents)


@given(
    st.integers(1, 6), st.integers(1, 5), st.integers(1, 6), st.integers(1, 40), st.integers(1, 7), st.integers(1, 6),
    st.sampled_from([0.0, 0.02, 0.3, 1.1]), st.integers(0, 10**6),
)  # fmt: skip
def test_a_tree_holds_the_main_chain_and_the_likeliest_nodes(
    drafts: int, beams: int, candidates: int, most: int, depth: int, children: int, least: float, seed: int
) -> None:
    beams = min(beams, candidates)
    tokens, probs, parents = grown(drafts, beams, candidates, seed)
    layout = BeamLayout(drafts, beams, candidates)
    found = layout.tree(tokens, probs, parents, most=most, depth=depth, children=children, least=least)

    tree = TokenTree([99, *found.tokens], [-1, *found.parents])  # raises if it is none
    reach: dict[int, float] = {}
    level: dict[int, int] = {}
    for node, (prob, parent) in enumerate(zip(probs.tolist(), parents.tolist(), strict=True)):
        reach[node] = prob * reach.get(parent, 1.0)
        level[node] = level.get(parent, 0) + 1
    np.testing.assert_allclose(layout.reach(probs, parents), list(reach.values()), rtol=1e-5)
    sibling = {node: sum(parents[:node] == parents[node]) for node in reach}
    main = [0]
    while len(main) < depth and (below := np.flatnonzero(parents == main[-1])).size:
        main.append(int(below[0]))
    allowed: set[int] = set()
    for node in reach:
        fits = level[node] <= depth and sibling[node] < children and np.float32(reach[node]) >= least
        if node in main or (fits and (parents[node] < 0 or parents[node] in allowed)):
            allowed.add(node)
    assert len(found.tokens) == min(max(most, len(main)), len(allowed)) >= 1
    of_rows = [1.0]
    for parent, prob in zip(found.parents, found.probs, strict=True):
        of_rows.append(of_rows[parent] * prob)
    rest = sorted((reach[node] for node in allowed if node not in main), reverse=True)
    best = sorted([*(reach[node] for node in main), *rest[: max(0, most - len(main))]], reverse=True)
    np.testing.assert_allclose(sorted(of_rows[1:], reverse=True), best, rtol=1e-5)

    chain, row = [], tree.first_child(0)
    while row >= 0:
        chain.append(row)
        row = tree.first_child(row)
    assert found.main == chain and len(chain) == len(main)


def test_fewer_texts_than_candidates_follow_each_other() -> None:
    """Two drafts, one text, two candidates: nodes 2 and 3 follow the likelier first token."""
    tokens, parents = np.array([5, 6, 7, 8]), np.array([-1, -1, 0, 0])
    probs = np.array([0.6, 0.3, 0.5, 0.4], np.float32)
    layout = BeamLayout(2, 1, 2)
    found = layout.tree(tokens, probs, parents, most=3, depth=2, children=2, least=0.0)
    assert (found.tokens, found.parents, found.main) == ([5, 6, 7], [0, 0, 1], [1, 3])
    assert layout.tree(tokens, probs, parents, most=9, depth=1, children=1, least=0.0).tokens == [5]
