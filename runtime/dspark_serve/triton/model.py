"""The model itself: one instance, which embeds a service that runs all requests together.

Triton calls it with one request at a time and goes on without an answer; the responses come later, from another thread.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dspark_runtime import Service
from dspark_runtime.errors import DsparkError, UsageError
from dspark_runtime.serving.events import Listener
from dspark_runtime.serving.handle import Handle
from dspark_runtime.text.codec import TextCodec
from dspark_serve.triton.asking import Ask, deadline_of, read
from dspark_serve.triton.metrics import Metrics
from dspark_serve.triton.responses import Outbox
from dspark_serve.triton.settings import Settings

_log = logging.getLogger(__name__)


class ServiceModel:
    """``initialize``, ``execute`` and ``finalize`` are called by Triton; a subclass says where Triton's module is."""

    pb_utils: Any
    """The module ``triton_python_backend_utils``."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle and start the service; every error ends the loading of the model with its message."""
        try:
            settings = Settings.parse(args["model_config"])
            bundle = settings.open(Path(args["model_repository"], args["model_version"]))
            self._service: Service = bundle.serve(settings.service_options())
        except DsparkError as error:
            raise self.pb_utils.TritonModelException(f"{type(error).__name__}: {error}") from error
        self._codec: TextCodec | None = None
        with suppress(UsageError):  # a bundle without a tokenizer takes and gives token ids
            self._codec = bundle.codec
        self._drain = settings.drain_seconds
        self._outbox = Outbox(self.pb_utils, Metrics(self.pb_utils, self._service, args["model_name"]))

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests; they are answered later."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                ask = read(given, self._service, self._codec)
                deadline = deadline_of(json.loads(request.parameters() or "{}"), request.timeout())
                self._outbox.accept(sender, ask, self._submitting(ask, deadline))
            except DsparkError as error:
                self._outbox.refuse(sender, error)
            except Exception as error:
                _log.exception("a bug in the model")
                self._outbox.refuse(sender, error)

    def _submitting(self, ask: Ask, deadline: float | None) -> Callable[[Listener], Handle]:
        return lambda listener: self._service.submit(ask.request, listener, deadline=deadline)

    def finalize(self) -> None:
        """Let what runs come to its end, for a while, and stop."""
        self._service.close(self._drain)
        self._outbox.close()
