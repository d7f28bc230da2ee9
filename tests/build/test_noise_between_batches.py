"""Whether a text changes beside others: measured by the build, and what a service makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dspark_export.build.row_noise import NOISE_PREFIX, batch_logits, noise_between_batches, row_logits
from dspark_runtime import Bundle, ServiceOptions
from dspark_runtime.errors import UsageError
from tests.shared.bundles import built_llama


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_llama(tmp_path_factory.mktemp("noise"))


def recorded(bundle: Path, value: float | None, tmp_path: Path) -> Bundle:
    """The bundle, with another figure in its manifest."""
    other = tmp_path / "b.dspark"
    shutil.copytree(bundle, other)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["precision"]["row_noise"]["between_batches"] = value
    (other / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.open(other, threads=1, exact=True, verify_digests=False)


def test_a_text_beside_others_is_read_behind_its_own_context(bundle: Path) -> None:
    """The measuring passes give what passes of one sequence give, and notice where they do not."""
    engine = Bundle.open(bundle, threads=1).engine("target", batched=True)
    ids = [int(i) for i in np.random.default_rng(3).integers(0, engine.vocab_size, 60)]
    alone = row_logits(engine, ids, NOISE_PREFIX, 2)
    for others in (0, 3):
        np.testing.assert_allclose(batch_logits(engine, ids, NOISE_PREFIX, 2, others), alone, atol=1e-4)
    assert noise_between_batches(engine, ids, 10_000) is not None
    assert noise_between_batches(engine, ids, 100) is None
    assert noise_between_batches(engine, ids[:8], 10_000) is None


def test_a_build_records_it(bundle: Path) -> None:
    noise = Bundle.open(bundle).manifest.precision.row_noise
    assert noise is not None and noise.between_batches is not None and noise.between_batches < 1e-3


@pytest.mark.parametrize(("value", "text"), [(None, "was not measured"), (0.25, r"moves logits by up to 0\.25")])
def test_an_exact_service_is_refused_where_texts_depend_on_others(
    bundle: Path, value: float | None, text: str, tmp_path: Path
) -> None:
    opened = recorded(bundle, value, tmp_path)
    with pytest.raises(UsageError, match=text):
        opened.serve(ServiceOptions(rows=2, capacity=64))
    opened.serve(ServiceOptions(rows=1, capacity=64)).close()
    inexact = Bundle.open(opened.files.root, threads=1, exact=False, verify_digests=False)
    inexact.serve(ServiceOptions(rows=2, capacity=64)).close()


def test_an_exact_service_is_taken_where_they_do_not(bundle: Path, tmp_path: Path) -> None:
    recorded(bundle, 0.0, tmp_path).serve(ServiceOptions(rows=2, capacity=64)).close()
