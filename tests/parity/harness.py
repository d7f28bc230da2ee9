"""Running an exported graph by hand, and the plain transformers model it must agree with.

``GraphRunner`` is deliberately not the project's runtime: it does the least that the contract asks of a caller, so
that a fault in one does not hide a fault in the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from transformers import PreTrainedModel

from dspark_runtime.backends.protocol import FLOAT_PRODUCTS

CAPACITY = 96


@dataclass(frozen=True)
class Tree:
    """A token tree: ``parents[i] < i``, -1 for the root."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]

    def path(self, node: int) -> list[int]:
        """Node numbers from the root to ``node``."""
        up = [node]
        while self.parents[up[-1]] >= 0:
            up.append(self.parents[up[-1]])
        return up[::-1]

    @staticmethod
    def random(rng: np.random.Generator, size: int, vocab: int) -> Tree:
        parents = [-1, *(int(rng.integers(max(0, i - 3), i)) for i in range(1, size))]
        return Tree(tuple(int(t) for t in rng.integers(3, vocab, size)), tuple(parents))

    @staticmethod
    def chain(tokens: Sequence[int]) -> Tree:
        return Tree(tuple(tokens), tuple(range(-1, len(tokens) - 1)))


class GraphRunner:
    """A graph, one set of cache buffers bound as past and as present, and the committed length of each sequence."""

    def __init__(self, path: Path, batch: int, *, fill: float = 0.0, caches: GraphRunner | None = None) -> None:
        self.session = ort.InferenceSession(path, self.options(), providers=["CPUExecutionProvider"])
        self.lengths = [0] * batch if caches is None else caches.lengths
        self.past: dict[str, ort.OrtValue] = {}
        for value in self.session.get_inputs():
            if value.name.startswith("past_key_values."):
                if caches is not None:
                    self.past[value.name] = caches.past[value.name]
                else:
                    shape = [{"batch": batch, "capacity": CAPACITY}.get(d, d) for d in value.shape]
                    dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.type]
                    self.past[value.name] = ort.OrtValue.ortvalue_from_numpy(np.full(shape, fill, dtype))

    def options(self) -> ort.SessionOptions:
        """How the session runs; a subclass may differ."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        return options

    def step(self, trees: Sequence[Tree]) -> list[np.ndarray]:
        """One pass over a tree per sequence; returns the logits [nodes, vocab] of each. Commits nothing."""
        tokens = max(len(tree.tokens) for tree in trees)
        kv_len = max(self.lengths) + tokens
        batch = len(trees)
        ids = np.zeros((batch, tokens), np.int64)
        positions = np.zeros((batch, tokens), np.int64)
        mask = np.zeros((batch, 1, tokens, kv_len), bool)
        for b, tree in enumerate(trees):
            n, count = self.lengths[b], len(tree.tokens)
            ids[b, :count] = tree.tokens
            for i in range(count):
                path = tree.path(i)
                positions[b, i] = n + len(path) - 1
                mask[b, 0, i, :n] = True
                mask[b, 0, i, [n + j for j in path]] = True
            for i in range(count, tokens):
                mask[b, 0, i, n + i] = True
        rows = np.tile(np.arange(tokens), (batch, 1))
        logits = self.run(ids, positions, mask, np.array(self.lengths), rows)[0]
        return [logits[b, : len(tree.tokens)] for b, tree in enumerate(trees)]

    def run(
        self, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray, write: np.ndarray, rows: np.ndarray
    ) -> list[np.ndarray]:
        """The raw call: outputs before the caches, as numpy; the caches are updated in place."""
        binding = self.session.io_binding()
        feeds = {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": mask,
            "write_indices": write,
            "logit_rows": rows,
        }
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in self.past.items():
            binding.bind_ortvalue_input(name, value)
        outputs = [o.name for o in self.session.get_outputs()]
        free = [name for name in outputs if not name.startswith("present.")]
        for name in outputs:
            if name in free:
                binding.bind_output(name)
            else:
                binding.bind_ortvalue_output(name, self.past[name.replace("present.", "past_key_values.")])
        self.session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()[: len(free)]]

    def commit(self, sequence: int, tree: Tree, node: int) -> list[int]:
        """Keep the path from the root to ``node``: compact its rows to the front. Returns its tokens."""
        n, path = self.lengths[sequence], tree.path(node)
        for value in self.past.values():
            cache = value.numpy()
            cache[sequence, :, n : n + len(path)] = cache[sequence, :, [n + i for i in path]].swapaxes(0, 1)
            value.update_inplace(cache)
        self.lengths[sequence] = n + len(path)
        return [tree.tokens[i] for i in path]

    def poison(self, value: float, start: Sequence[int]) -> None:
        """Overwrite the cache of each sequence from slot ``start[b]`` on."""
        for cache_value in self.past.values():
            cache = cache_value.numpy()
            for b, slot in enumerate(start):
                cache[b, :, slot:] = value
            cache_value.update_inplace(cache)


class FloatProducts(GraphRunner):
    """Runs products of quantized weights in float32 (the kernels' default rounds the activations to 8 bits)."""

    def options(self) -> ort.SessionOptions:
        """See :class:`GraphRunner`."""
        options = super().options()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(FLOAT_PRODUCTS))
        return options


class Literal(GraphRunner):
    """Runs the graph as it is written: dequantize, then multiply, in float32."""

    def options(self) -> ort.SessionOptions:
        """See :class:`GraphRunner`."""
        options = super().options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return options


@torch.no_grad()
def plain_logits(model: PreTrainedModel, tokens: Sequence[int]) -> np.ndarray:
    """Logits [tokens, vocab] of the untouched transformers model, run once over the whole text without a cache."""
    logits: np.ndarray = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].float().numpy()
    return logits


def tree_logits(model: PreTrainedModel, prefix: Sequence[int], tree: Tree) -> np.ndarray:
    """What ``plain_logits`` says of every node of ``tree`` after ``prefix``: each root-to-leaf path run alone."""
    wanted = np.empty((len(tree.tokens), model.config.get_text_config().vocab_size), np.float32)
    leaves = set(range(len(tree.tokens))) - set(tree.parents)
    for leaf in leaves:
        path = tree.path(leaf)
        logits = plain_logits(model, [*prefix, *(tree.tokens[i] for i in path)])
        for depth, node in enumerate(path):
            wanted[node] = logits[len(prefix) + depth]
    return wanted


def assert_close(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    """Largest difference at most ``tolerance`` times the largest wanted magnitude (at least 1)."""
    assert found.shape == wanted.shape
    worst = float(np.abs(found - wanted).max())
    assert worst <= tolerance * max(1.0, float(np.abs(wanted).max())), f"differs by {worst}"
