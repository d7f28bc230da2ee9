"""What is served: an opened bundle, its service, and the name it goes by."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from dspark_serve.errors import ApiError
from dspark_serve.guides import Grammars
from dspark_serve.metrics import Metrics
from dspark_serve.streams import Bridge, StreamLimits
from dspark_serve.tools import ToolFormat, no_tools, tool_format

if TYPE_CHECKING:
    from dspark_runtime import Bundle, Service, ServiceOptions
    from dspark_runtime.text.codec import TextCodec


Result = TypeVar("Result")


@dataclass
class Served:
    """One model. ``bridge`` is there once the event loop runs.

    Prompts are rendered and encoded one after another on a thread of their own: a long one does not keep the event
    loop, and a chat template is not made for two threads.
    """

    bundle: Bundle
    service: Service
    name: str
    metrics: Metrics
    grammars: Grammars
    created: int = field(default_factory=lambda: int(time.time()))
    _bridge: Bridge | None = None
    _tool_format: list[ToolFormat | None] = field(default_factory=list)
    _texts: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "dspark-text"))

    @classmethod
    def start(cls, bundle: Bundle, options: ServiceOptions, name: str, metrics: Metrics | None = None) -> Served:
        """Start a service of ``bundle``; closing it is the caller's.

        Raises:
            DsparkError: as for :meth:`Bundle.serve`; or the bundle has no tokenizer.
        """
        _ = bundle.codec
        metrics = metrics or Metrics()
        service = bundle.serve(options, metrics)
        manifest = bundle.manifest
        metrics.watch(service, manifest.created_by, name, manifest.precision.weights)
        return cls(bundle, service, name, metrics, Grammars(bundle))

    @property
    def bridge(self) -> Bridge:
        """Submits requests."""
        assert self._bridge is not None, "the server has not started"
        return self._bridge

    def connect(self, limits: StreamLimits) -> None:
        """Make the bridge to the event loop that runs."""
        self._bridge = Bridge(self.service, limits)

    @property
    def codec(self) -> TextCodec:
        """Tokenizer and chat template."""
        return self.bundle.codec

    @property
    def capacity(self) -> int:
        """Most tokens of a request, prompt and text together."""
        return self.service.limits.positions

    @cached_property
    def fingerprint(self) -> str:
        """Names the files of the bundle: another fingerprint, other texts."""
        digests = sorted(f"{path} {entry.sha256}" for path, entry in self.bundle.manifest.files.items())
        return f"fp_{hashlib.sha256(chr(10).join(digests).encode()).hexdigest()[:12]}"

    async def tool_format(self) -> ToolFormat:
        """How the model calls tools; ApiError if it cannot."""
        if not self._tool_format:
            self._tool_format.append(await self.on_text_thread(lambda: tool_format(self.codec)))
        if self._tool_format[0] is None:
            raise no_tools()
        return self._tool_format[0]

    async def on_text_thread(self, work: Callable[[], Result]) -> Result:
        """``work``, which uses the codec, done away from the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, work)

    def check_model(self, name: str) -> None:
        """ApiError unless ``name`` is what is served."""
        if name != self.name:
            raise ApiError(
                404,
                f"the model {name[:100]!r} does not exist; this server has {self.name!r}",
                code="model_not_found",
                param="model",
            )
