"""Every architecture in the form for the sequence kernels: the same numbers, bits that depend on the sequence alone.

The law is tested as it is stated: whatever passes a sequence is run in (its prompt in chunks, trees of any shape, other
sequences beside it that are ahead or behind), every row has the bits of plain decoding, one row at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from dspark_export.bundle.weights import save_graphs
from dspark_export.graphs.target import export_target
from dspark_export.passes import all_forms, kernels_of, optimize
from dspark_export.passes.packed_weights import PackedWeights, load_plain
from dspark_export.validate.rebuild import tensors
from dspark_runtime.backends.protocol import FLOAT_PRODUCTS
from dspark_runtime.bundle.precisions import Weights
from tests.kernels.conftest import Forms
from tests.parity.harness import GraphRunner, Tree, assert_close
from tests.tiny_models import ARCHITECTURES, VOCAB
from tests.traced import traced

PRECISIONS: tuple[Weights, ...] = ("fp32", "bf16", "fp16", "int8", "int4", "w8a8")
WITHOUT_A_KERNEL = {"deepseek_v2", "deepseek_v3"}
"""Their attention reads keys that are made of cached latents in every pass."""
MORE = ("gpt_oss", "mimo_v2_flash", "granite_swa", "phi")
"""With attention sinks, experts that lie the other way round, and rotary embeddings of some columns of a head."""
_LENGTH = 24
EVERY_PRECISION = ("llama", "gemma2", "qwen3_moe", "gpt2", "qwen2")
HALF = ("bf16", "fp16")


class WithKernels(GraphRunner):
    """Runs a graph with the library registered, on ``threads`` threads."""

    library: Path
    threads = 1

    def options(self) -> ort.SessionOptions:
        """See :class:`GraphRunner`."""
        options = super().options()
        options.register_custom_ops_library(str(self.library))
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(FLOAT_PRODUCTS))
        return options


@pytest.fixture(scope="module")
def with_kernels(library: Path) -> Callable[..., WithKernels]:
    def opened(path: Path, batch: int, threads: int = 1) -> WithKernels:
        kind = type("Runner", (WithKernels,), {"library": library, "threads": threads})
        return kind(path, batch)

    return opened


def _passes(runner: GraphRunner, seed: int) -> list[np.ndarray]:
    """Logits of two sequences: prompts of other lengths, then trees of other sizes."""
    rng, found = np.random.default_rng(seed), []
    steps = [[Tree.chain([int(t) for t in rng.integers(3, VOCAB, n)]) for n in (13, 5)]]
    steps += [[Tree.random(rng, size, VOCAB) for size in sizes] for sizes in ((6, 3), (1, 8))]
    for trees in steps:
        found += runner.step(trees)
        for b, tree in enumerate(trees):
            runner.commit(b, tree, len(tree.tokens) - 1)
    return found


@pytest.mark.parametrize("arch", (*ARCHITECTURES, *MORE))
def test_bodies_have_the_numbers_of_the_standard_graph(arch: str, forms: Callable[[str, Weights], Forms]) -> None:
    made = forms(arch, "fp32")
    wanted = _passes(GraphRunner(made.files["standard"], 2), seed=1)
    for found, logits in zip(_passes(GraphRunner(made.files["sequence-kernels"], 2), seed=1), wanted, strict=True):
        assert_close(found, logits)
    assert bool(made.left) == (arch in WITHOUT_A_KERNEL), made.left


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("arch", (*ARCHITECTURES, *MORE))
def test_kernels_have_the_numbers_of_their_bodies(
    arch: str,
    precision: Weights,
    forms: Callable[[str, Weights], Forms],
    with_kernels: Callable[..., WithKernels],
) -> None:
    if precision != "fp32" and arch not in EVERY_PRECISION[: 2 if precision in HALF else None]:
        pytest.skip("other precisions run on some architectures")
    if precision != "fp32" and "moe" in arch:
        pytest.skip("rounded activations choose another expert now and then")
    path = forms(arch, precision).files["sequence-kernels"]
    wanted = _passes(GraphRunner(path, 2), seed=2)
    rounding = 1e-5 if precision in ("fp32", *HALF) else 5e-2  # kernels round activations to 8 bits
    for found, logits in zip(_passes(with_kernels(path, 2), seed=2), wanted, strict=True):
        assert_close(found, logits, rounding)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("arch", [arch for arch in (*ARCHITECTURES, *MORE) if arch not in WITHOUT_A_KERNEL])
def test_bits_of_a_row_depend_on_its_sequence_alone(
    arch: str,
    precision: Weights,
    forms: Callable[[str, Weights], Forms],
    with_kernels: Callable[..., WithKernels],
) -> None:
    if precision != "fp32" and arch not in EVERY_PRECISION[: 2 if precision in HALF else None]:
        pytest.skip("other precisions run on some architectures")
    path = forms(arch, precision).files["sequence-kernels"]
    rng = np.random.default_rng(sum(map(ord, arch + precision)))
    texts = [[int(t) for t in rng.integers(3, VOCAB, _LENGTH)] for _ in range(3)]
    plain = [_one_by_one(with_kernels(path, 1), text) for text in texts]
    for threads in (1, 3):
        runner = with_kernels(path, len(texts), threads)
        while min(runner.lengths) < _LENGTH:
            _random_pass(runner, texts, plain, rng)


@pytest.mark.parametrize(("half", "kernel"), [(ir.DataType.BFLOAT16, "BFloat16"), (ir.DataType.FLOAT16, "Float16")])
def test_weights_that_16_bits_hold_are_stored_in_those_and_give_the_same_bits(
    half: ir.DataType,
    kernel: str,
    tmp_path: Path,
    with_kernels: Callable[..., WithKernels],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def saved(folder: str) -> tuple[dict[str, Path], tuple[str, ...]]:
        graph = optimize(export_target(traced("llama")[1]))
        for value in graph.graph.initializers.values():
            if value.dtype == ir.DataType.FLOAT and value.const_value is not None and value.const_value.size > 64:
                rounded = value.const_value.numpy().astype(half.numpy()).astype(np.float32)
                value.const_value = ir.tensor(rounded, name=value.name)
        shipped = {variant: form for _, variant, form in all_forms({"target": graph}, 128, kernels=True)}
        return save_graphs(shipped, tmp_path / folder), kernels_of(shipped["sequence-kernels"])

    narrow, called = saved("narrow")
    assert f"Product{kernel}" in called and "ProductFloat32" not in called
    monkeypatch.setattr(PackedWeights, "narrowest", lambda self, source: source.dtype)
    wide, called = saved("wide")
    assert "ProductFloat32" in called and f"Product{kernel}" not in called
    assert _size(narrow) < 0.7 * _size(wide)
    wanted = _passes(with_kernels(wide["sequence-kernels"], 2), seed=3)
    for found, logits in zip(_passes(with_kernels(narrow["sequence-kernels"], 2), seed=3), wanted, strict=True):
        assert np.array_equal(found, logits)
    standard = _passes(GraphRunner(narrow["standard"], 2), seed=3)
    for found, logits in zip(standard, _passes(GraphRunner(wide["standard"], 2), seed=3), strict=True):
        assert np.array_equal(found, logits)
    plain, other = (tensors(load_plain(files["standard"])) for files in (narrow, wide))
    assert all(np.array_equal(array, other[name]) for name, array in plain.items())


def _size(files: dict[str, Path]) -> int:
    return (next(iter(files.values())).parent / "weights.data").stat().st_size


def _one_by_one(runner: GraphRunner, text: list[int]) -> np.ndarray:
    rows = []
    for token in text:
        tree = Tree.chain([token])
        rows.append(runner.step([tree])[0][0])
        runner.commit(0, tree, 0)
    return np.stack(rows)


def _random_pass(
    runner: GraphRunner, texts: list[list[int]], plain: list[np.ndarray], rng: np.random.Generator
) -> None:
    """One pass over all sequences: each verifies a tree with its text in it, and accepts some of that.

    A sequence that is at its end runs its last token again, as one that has left the batch would not.
    """
    trees, paths = [], []
    for b, text in enumerate(texts):
        at = runner.lengths[b]
        if at == len(text):
            runner.lengths[b] = at = len(text) - 1
        tree, path = _tree_with(text[at : at + int(rng.integers(1, 9))], rng)
        trees.append(tree)
        paths.append(path)
    for b, logits in enumerate(runner.step(trees)):
        at = runner.lengths[b]
        wanted = plain[b][at : at + len(paths[b])]
        assert np.array_equal(logits[paths[b]], wanted), (
            f"sequence {b} at {at}: {np.abs(logits[paths[b]] - wanted).max()}"
        )
        runner.commit(b, trees[b], paths[b][int(rng.integers(0, len(paths[b])))])


def _tree_with(text: list[int], rng: np.random.Generator) -> tuple[Tree, list[int]]:
    """A tree whose branches stand between and after the rows of ``text``; the rows of ``text`` in it."""
    tokens, parents, path = [text[0]], [-1], [0]
    for token in text[1:]:
        for _ in range(int(rng.integers(0, 3))):
            tokens.append(int(rng.integers(3, VOCAB)))
            parents.append(int(rng.integers(0, len(tokens) - 1)))
        tokens.append(token)
        parents.append(path[-1])
        path.append(len(tokens) - 1)
    return Tree(tuple(tokens), tuple(parents)), path
