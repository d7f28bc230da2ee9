"""Bundles on the sequence kernels: exact whatever the setting; what happens where the library lacks an operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_export.passes.kernel_functions import kernel_names
from dspark_export.passes.packed_weights import load_plain
from dspark_export.validate.lossless import check_noise
from dspark_export.validate.rebuild import tensors
from dspark_runtime import Bundle
from dspark_runtime.backends import opening, ort_kernels
from dspark_runtime.backends.ort_kernels import SlowerWithoutKernels
from dspark_runtime.backends.protocol import FLOAT_PRODUCTS, ROUNDED_ACTIVATIONS, Engine
from dspark_runtime.bundle.files import BundleFiles
from tests.drafts.writers import target_tables, write_deepspec, write_target
from tests.plugins.cpu.library import operators_of
from tests.validate.faults import copied, scale_weight

PROMPTS = [[int(i) for i in np.random.default_rng(n).integers(3, 60, 5 + 9 * n)] for n in range(3)]
MODES = ("off", "ngram", "auto")


@pytest.fixture
def registered(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(ort_kernels.LIBRARY_VARIABLE, str(library))
    ort_kernels._warn_once.cache_clear()
    yield library
    ort_kernels._warn_once.cache_clear()


@pytest.fixture(scope="module")
def bundle(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int4, whose setting without drafts would not be exact; built with the library."""
    folder = tmp_path_factory.mktemp("kernels")
    target = write_target(folder / "target")
    draft = write_deepspec(folder / "dspark", tables=target_tables(target))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ort_kernels.LIBRARY_VARIABLE, str(library))
        options = {"precision": "int4", "exact": False, "self_draft": "none", "drafts": (str(draft.folder),)}
        build(BuildOptions(model=str(target), out=folder / "int4.dspark", threads=1, **options))  # type: ignore[arg-type]
    return folder / "int4.dspark"


@pytest.fixture(scope="module")
def tied(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32, by default with the kernels; the embedding is the head, and the draft has a smaller head of its own."""
    folder = tmp_path_factory.mktemp("tied")
    target = write_target(folder / "target", tie_word_embeddings=True)
    draft = write_deepspec(folder / "dspark", tables=target_tables(target))
    np.save(folder / "ids.npy", np.arange(3, 340, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ort_kernels.LIBRARY_VARIABLE, str(library))
        drafts = {"drafts": (str(draft.folder),), "draft_vocab": folder / "ids.npy", "self_draft": "none"}
        build(BuildOptions(model=str(target), out=folder / "fp32.dspark", threads=1, **drafts))  # type: ignore[arg-type]
    return folder / "fp32.dspark"


def _texts(bundle: Bundle, mode: str, batch: int) -> list[list[int]]:
    made = bundle.generate(PROMPTS, max_new_tokens=24, speculate=mode, batch_size=batch, ignore_eos=True)
    return [list(generation.tokens) for generation in made]


def test_texts_are_equal_in_every_mode_and_batch(registered: Path, bundle: Path) -> None:
    opened = Bundle.open(bundle, threads=1)
    assert opened.rows_are_equal and opened.exact and not opened.manifest.precision.exact
    noise = opened.manifest.precision.row_noise
    assert noise is not None and noise.max_abs_logit_diff == 0.0
    wanted = _texts(opened, "off", 1)
    for mode in MODES:
        for batch in (1, 3):
            assert _texts(opened, mode, batch) == wanted, (mode, batch)


def test_without_a_library_a_bundle_runs_on_other_operators(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ort_kernels.LIBRARY_VARIABLE, ort_kernels.NO_LIBRARY)
    opened = Bundle.open(bundle, threads=1)
    assert not opened.rows_are_equal and not opened.exact
    assert opened.engine_options.accuracy_level == ROUNDED_ACTIVATIONS
    # The build measured no noise, but on the kernels: exact text takes float32 products on these operators.
    assert opened.manifest.precision.rows_agree
    assert Bundle.open(bundle, threads=1, exact=True).engine_options.accuracy_level == FLOAT_PRODUCTS
    assert opening.host_graph(opened.files, "target").variant == "onnxruntime-cpu"
    assert len(_texts(opened, "off", 3)) == len(PROMPTS)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ('-DDSPARK_WITHOUT="RMSNorm"', "lacks the sequence kernels RMSNorm: standard operators run"),
        ('-DDSPARK_WITHOUT="ProductInt4"', "lacks the sequence kernels ProductInt4: standard operators run"),
        ("-Ddspark_cpu_operators=dspark_cpu_later", "is too old to name its sequence kernels"),
    ],
)
def test_a_bundle_runs_on_a_library_that_lacks_a_kernel_and_says_so_once(
    option: str,
    said: str,
    registered: Path,
    bundle: Path,
    other_library: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = _texts(Bundle.open(bundle, threads=1), "off", 1)
    monkeypatch.setenv(ort_kernels.LIBRARY_VARIABLE, str(other_library(option)))
    with pytest.warns(SlowerWithoutKernels, match=said) as heard:
        opened = Bundle.open(bundle, threads=1)
        found = _texts(opened, "ngram", 3)
    assert len(heard) == 1
    assert not opened.rows_are_equal and not opened.exact
    assert opened.engine_options.accuracy_level == ROUNDED_ACTIVATIONS
    # The build measured no noise, but on the kernels: exact text takes float32 products on these operators.
    assert opened.manifest.precision.rows_agree
    assert Bundle.open(bundle, threads=1, exact=True).engine_options.accuracy_level == FLOAT_PRODUCTS
    assert opening.host_graph(opened.files, "target").variant == "sequence-kernels"
    assert [tokens[:1] for tokens in found] == [tokens[:1] for tokens in wanted]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Bundle.open(bundle, threads=1).generate(PROMPTS[0], max_new_tokens=2).tokens


def test_validation_holds_no_noise_of_the_kernels_against_other_operators(
    registered: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = check_noise(Bundle.open(bundle, threads=1), PROMPTS[2])
    assert (found.status, found.measured, found.limit) == ("passed", 0.0, 0.0)
    monkeypatch.setenv(ort_kernels.LIBRARY_VARIABLE, ort_kernels.NO_LIBRARY)
    found = check_noise(Bundle.open(bundle, threads=1), PROMPTS[2])
    assert found.measured is not None and found.measured > 4e-4  # what the limit would be of a bundle without noise
    assert (found.status, found.limit) == ("passed", None)


def test_what_the_library_names_is_what_bundles_may_call(library: Path, other_library: Callable[[str], Path]) -> None:
    names = operators_of(library)
    assert list(names) == sorted(set(names)) and kernel_names() <= set(names)
    assert set(names) - set(operators_of(other_library('-DDSPARK_WITHOUT="RMSNorm"'))) == {"RMSNorm"}


def test_graphs_for_the_cpu_get_kernels_where_there_are_any(registered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wanted(**options: Any) -> bool:
        return BuildOptions("model", Path("out"), **options).with_kernels

    assert wanted() and wanted(precision="int4") and wanted(precision="w8a8") and wanted(precision="bf16")
    assert not wanted(kernels=False) and not wanted(precision="int4", backend="tensorrt")
    monkeypatch.setenv(ort_kernels.LIBRARY_VARIABLE, ort_kernels.NO_LIBRARY)
    assert not wanted() and wanted(kernels=True)


def test_a_draft_reads_the_targets_table_and_its_own_head(
    registered: Path, tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drafted() -> list[tuple[list[int], float]]:
        made = Bundle.open(tied, threads=1).generate(PROMPTS, max_new_tokens=24, speculate="dspark", ignore_eos=True)
        return [(list(generation.tokens), generation.stats.accepted_length) for generation in made]

    graphs = {name: ir.load(path).graph for name in ("dspark", "target") for path in (_kernel_graph(tied, name),)}
    heads = [{name for name in graph.initializers if name.startswith("lm_head")} for graph in graphs.values()]
    assert "Lookup" in {node.op_type[:6] for node in graphs["dspark"]}
    assert len(heads[0]) == 2 and heads[1] < heads[0]  # the target's tiles, and none of the table beside them
    assert not any("embed" in name for graph in graphs.values() for name in graph.initializers)
    on_kernels = drafted()
    monkeypatch.setenv(ort_kernels.LIBRARY_VARIABLE, ort_kernels.NO_LIBRARY)
    assert drafted() == on_kernels


def test_a_packed_weight_is_found_under_its_own_name(tied: Path, tmp_path: Path) -> None:
    """What validation compares with a fresh export."""

    def change(weights: np.ndarray) -> np.ndarray:
        weights[7] += 0.5
        return weights

    damaged, name = copied(tied, tmp_path / "damaged"), "model.layers.3.mlp.down_proj.weight"
    scale_weight(damaged, "target", name, change)
    healthy, other = (tensors(load_plain(bundle / "onnx" / "target.onnx")) for bundle in (tied, damaged))
    assert [key for key in healthy if not np.array_equal(healthy[key], other[key])] == [name]
    assert np.array_equal(other[name], change(healthy[name].copy()))


def _kernel_graph(bundle: Path, name: str) -> Path:
    files = BundleFiles.open(bundle)
    return files.path(files.graph(name, prefer=("sequence-kernels",)).file)


def test_one_engine_runs_one_sequence_and_many(registered: Path, tied: Path) -> None:
    opened = Bundle.open(tied, threads=1)
    assert opened.engine("target", batched=True) is opened.engine("target")
    assert opened.graph_engine("dspark", batched=True) is opened.graph_engine("dspark")


@pytest.mark.parametrize("name", ["tied", "bundle"])
def test_logits_of_a_ragged_batch_are_those_of_each_sequence_alone(
    name: str, registered: Path, request: pytest.FixtureRequest
) -> None:
    """Prompts of other lengths, then passes of several rows over all of them at once, and over some of them."""
    engine = Bundle.open(request.getfixturevalue(name), threads=2).engine("target", batched=True)
    rng = np.random.default_rng(7)
    passes = [rng.integers(3, 60, (len(PROMPTS), rows)) for rows in (1, 4, 9, 2)]
    together = _Runs(engine, PROMPTS)
    found = [together.run(0, len(PROMPTS), tokens) for tokens in passes]
    some = passes[0][1:]
    part = together.run(1, len(PROMPTS) - 1, some)
    for b, prompt in enumerate(PROMPTS):
        alone = _Runs(engine, [prompt])
        for tokens, logits in zip(passes, found, strict=True):
            assert np.array_equal(alone.run(0, 1, tokens[b : b + 1])[0], logits[b]), (b, tokens.shape)
        if b:
            assert np.array_equal(alone.run(0, 1, some[b - 1 : b])[0], part[b - 1])


class _Runs:
    """Sequences in one cache; their prompts run one by one, as a loop admits them."""

    def __init__(self, engine: Engine, prompts: list[list[int]]) -> None:
        self._runner = engine.open(engine.allocate(len(prompts), 64))
        self._lengths = np.zeros(len(prompts), np.int64)
        for b, prompt in enumerate(prompts):
            self.run(b, 1, np.asarray([prompt]))

    def run(self, first: int, count: int, tokens: np.ndarray) -> np.ndarray:
        """Logits [count, tokens, vocab] of a chain after each of the sequences from ``first`` on."""
        rows = tokens.shape[1]
        starts = self._lengths[first : first + count]
        self._runner.select(first, count)
        buffers = self._runner.prepare(rows, rows, int(starts.max()) + rows)
        positions = starts[:, None] + np.arange(rows)
        buffers.input_ids[...], buffers.position_ids[...], buffers.write_indices[...] = tokens, positions, starts
        buffers.logit_rows[...] = np.arange(rows)
        buffers.attention_mask[:, 0] = np.arange(buffers.attention_mask.shape[-1]) <= positions[:, :, None]
        self._runner.run()
        self._lengths[first : first + count] += rows
        return buffers.logits.copy()
