"""A bundle with a self-draft and a DSpark drafter, its model and its draft, built as a user would."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_export.validate.checks import Report
from dspark_export.validate.options import ValidateOptions
from dspark_export.validate.run import validate
from tests.drafts.writers import target_tables, write_deepspec, write_target
from tests.validate.faults import copied


@dataclass(frozen=True)
class Healthy:
    """Folders of the model and the draft, and bundles in float32 and int8."""

    model: Path
    draft: Path
    bundle: Path
    int8: Path


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Healthy:
    """See :class:`Healthy`."""
    folder = tmp_path_factory.mktemp("validate")
    model = write_target(folder / "model")
    draft = write_deepspec(folder / "dspark", tables=target_tables(model)).folder
    made = Healthy(model, draft, folder / "fp32.dspark", folder / "int8.dspark")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the draft has no tokenizer
        for out, precision, drafts in ((made.bundle, "fp32", (str(draft),)), (made.int8, "int8", ())):
            options = BuildOptions(
                model=str(model), out=out, precision=precision, drafts=drafts, self_draft="layers=0,1,2,6,7", threads=1
            )
            build(options)
    return made


Validated = Callable[[Path], Report]


@pytest.fixture
def validated(healthy: Healthy, tmp_path: Path) -> Validated:
    """Runs a quick validation against PyTorch."""

    def run(bundle: Path) -> Report:
        drafts = () if bundle.name.startswith("int8") else (str(healthy.draft),)
        options = ValidateOptions(
            bundle, model=str(healthy.model), drafts=drafts, threads=1, keep=tmp_path / "inputs", against="torch"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return validate(options)

    return run


@pytest.fixture
def damaged(healthy: Healthy, tmp_path: Path) -> Path:
    """A copy of the float32 bundle."""
    return copied(healthy.bundle, tmp_path / "fp32.damaged")
