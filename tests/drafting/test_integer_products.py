"""A w8a8 bundle with a drafter: exact by default, in every mode, and in float32 where exactness was not measured."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_export.build.row_noise import row_logits
from dspark_runtime import Bundle
from dspark_runtime.backends.protocol import FLOAT_PRODUCTS, ROUNDED_ACTIVATIONS
from tests.drafts.writers import target_tables, write_deepspec, write_target

PROMPTS = [[5, 9, 13, 40, 41, 42, 9, 13], [7, 8, 9] * 6, [100]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("w8a8")
    target = write_target(folder / "target")
    draft = write_deepspec(folder / "dspark", tables=target_tables(target)).folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the draft has no tokenizer
        options = BuildOptions(str(target), folder / "w8a8.dspark", precision="w8a8", drafts=(str(draft),), threads=1)
        build(options)
    return Bundle.open(options.out, threads=1)


def texts(bundle: Bundle, mode: str, **options: object) -> list[list[int]]:
    settings = {"max_new_tokens": 40, "ignore_eos": True, **options}
    return [g.tokens for g in bundle.generate(PROMPTS, speculate=mode, **settings)]


@pytest.mark.parametrize("mode", ["ngram", "dspark", "ngram+dspark", "self-draft", "auto"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 4}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_mode_gives_the_plain_text(
    bundle: Bundle, mode: str, options: dict[str, object], batch_size: int
) -> None:
    assert bundle.exact
    given = {"batch_size": batch_size, **options}
    assert texts(bundle, mode, draft_length=4, **given) == texts(bundle, "off", **given)


def test_each_kind_of_pass_has_its_form(bundle: Bundle) -> None:
    forms = {(g.name, g.variant) for g in bundle.manifest.graphs}
    for name in ("target", "self_draft", "dspark"):
        assert {(name, v) for v in ("standard", "onnxruntime-cpu", "onnxruntime-cpu-batch")} <= forms
    assert bundle.manifest.precision.block_size is None
    assert bundle.engine_options.accuracy_level == ROUNDED_ACTIVATIONS


def test_products_are_of_floats_where_exactness_was_not_measured(bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.files.root, tmp_path / "bundle"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["precision"]["row_noise"] = None
    (folder / "manifest.json").write_text(json.dumps(manifest))
    unmeasured = Bundle.open(folder, threads=1)
    assert unmeasured.engine_options.accuracy_level == FLOAT_PRODUCTS
    rounded, exact = (row_logits(b.target, PROMPTS[0], 2, 6) for b in (bundle, unmeasured))
    assert 0 < np.abs(rounded - exact).max() < 0.5 * np.abs(exact).max()
    assert texts(unmeasured, "dspark", draft_length=4) == texts(unmeasured, "off")
    fast = Bundle.open(folder, threads=1, exact=False)
    np.testing.assert_array_equal(row_logits(fast.target, PROMPTS[0], 2, 6), rounded)
