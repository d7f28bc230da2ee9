"""The ``parameters`` of a model's ``config.pbtxt``, which say what is served and how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dspark_runtime import Bundle, ServiceOptions
from dspark_runtime.backends.opening import BackendName
from dspark_runtime.errors import UsageError


class Settings(BaseModel):
    """What the parameters may say. ``bundle``: a folder, relative to that of the model's version.

    ``drain_seconds``: how long requests may take to end when the model is unloaded; less than the server's own
    ``--exit-timeout-secs``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str = "bundle"
    rows: int = 8
    max_length: int | None = None
    queue: int = 64
    chunk: int = 128
    speculate: str = "auto"
    threads: int | None = None
    exact: bool | None = None
    backend: BackendName = "onnxruntime"
    device: int = 0
    drain_seconds: float = 20.0

    @classmethod
    def parse(cls, config: str) -> Settings:
        """Of a model's configuration, as Triton gives it: JSON; UsageError as for :meth:`checked`."""
        parameters = json.loads(config).get("parameters", {})
        return cls.checked(**{name: entry["string_value"] for name, entry in parameters.items()})

    @classmethod
    def checked(cls, **values: Any) -> Settings:
        """Settings of these values; UsageError for an unknown name, or a value of the wrong type."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            names = ", ".join(cls.model_fields)
            raise UsageError(f"{name}={first['input']!r}: {first['msg']}; parameters are {names}") from error

    def parameters(self) -> Mapping[str, str]:
        """What is not the default, as ``config.pbtxt`` has it."""
        given: dict[str, Any] = self.model_dump(exclude_defaults=True)
        return {"bundle": self.bundle} | {
            name: json.dumps(value) if isinstance(value, bool) else str(value) for name, value in given.items()
        }

    def service_options(self) -> ServiceOptions:
        """Of the service; UsageError for a value outside its range."""
        return ServiceOptions(
            rows=self.rows, capacity=self.max_length, queue=self.queue, chunk=self.chunk, speculate=self.speculate
        )

    def open(self, version_folder: Path) -> Bundle:
        """The bundle, its digests checked.

        Raises:
            DsparkError: as for :meth:`Bundle.open`.
        """
        return Bundle.open(
            version_folder / self.bundle,
            threads=self.threads,
            exact=self.exact,
            capacity=self.max_length,
            backend=self.backend,
            device=self.device,
        )
