"""Bundles on the sequence kernels: exact whatever the setting; what happens where the library lacks an operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_export.passes.kernel_functions import kernel_names
from dspark_runtime import Bundle
from dspark_runtime.backends import opening, ort_kernels
from dspark_runtime.backends.ort_kernels import SlowerWithoutKernels
from dspark_runtime.backends.protocol import FLOAT_PRODUCTS, ROUNDED_ACTIVATIONS
from tests.drafts.writers import target_tables, write_deepspec, write_target
from tests.plugins.cpu.library import operators_of

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
        build(BuildOptions(model=str(target), out=folder / "int4.dspark", kernels=True, **options))  # type: ignore[arg-type]
    return folder / "int4.dspark"


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


def test_what_the_library_names_is_what_bundles_may_call(library: Path, other_library: Callable[[str], Path]) -> None:
    names = operators_of(library)
    assert list(names) == sorted(set(names)) and kernel_names() <= set(names)
    assert set(names) - set(operators_of(other_library('-DDSPARK_WITHOUT="RMSNorm"'))) == {"RMSNorm"}
