"""Types shared by all parts of the manifest."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def safe_relative_path(path: str) -> str:
    """``path`` itself if it is a plain relative path inside a bundle (forward slashes); ValueError otherwise."""
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(c in path for c in "\\:\0"):
        raise ValueError(f"{path!r} is not a plain relative path inside the bundle")
    return path


RelativePath = Annotated[str, AfterValidator(safe_relative_path)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
GraphName = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9_-]*$")]


class Record(BaseModel):
    """A part of the manifest: immutable, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
