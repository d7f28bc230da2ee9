"""One bundle with a draft of every kind, built as a user would."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_runtime import Bundle
from tests.drafts.writers import (
    Sizes,
    Written,
    target_tables,
    write_classic_eagle3,
    write_deepspec,
    write_target,
    write_zlab,
)


@dataclass(frozen=True)
class Pairs:
    """The target's folder and tables, the DSpark draft as it was written, and the bundle of all."""

    target: Path
    tables: tuple[torch.Tensor, torch.Tensor]
    dspark: Written
    bundle: Bundle


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """See :class:`Pairs`. ``draft-model`` is the target itself."""
    folder = tmp_path_factory.mktemp("pairs")
    target = write_target(folder / "target")
    tables = target_tables(target)
    dspark = write_deepspec(folder / "dspark", tables=tables)
    eagle = write_deepspec(folder / "eagle", "eagle3", tables=tables, sizes=Sizes(taps=(1, 2, 3, 4, 5)))
    drafts = [dspark, eagle, write_zlab(folder / "zlab"), write_classic_eagle3(folder / "classic")]
    names = (*(str(draft.folder) for draft in drafts), str(target))
    out = folder / "all.dspark"
    build(BuildOptions(model=str(target), out=out, drafts=names, self_draft="none"))
    return Pairs(target, tables, dspark, Bundle.open(out, threads=1))
