"""How a service is set up."""

from __future__ import annotations

from dataclasses import dataclass, field

from dspark_runtime.arguments import real, whole
from dspark_runtime.drafters.parts import DraftOptions
from dspark_runtime.errors import UsageError

MOST_PRIORITY = 9
DEFAULT_CAPACITY = 4096


@dataclass(frozen=True)
class ServiceOptions:
    """Sizes and rules of a service.

    Args:
        rows: requests that run together.
        capacity: most tokens of prompt and text of one request; None for 4096, or what the model has if that is less.
        queue: requests that may wait beside those that run; one more is refused.
        chunk: most prompt tokens that are computed between two rounds while other requests run.
        prefill_share: how much time prompts get beside the rounds of the others. With 1 a prompt takes about twice as
            long as alone; with less it takes longer and slows the others less. Where a row's bits depend on the size
            of its pass, every chunk has ``chunk`` tokens instead.
        speculate: drafters, as for :meth:`Bundle.generate`: ``auto``, ``off`` or names joined with ``+``.
        drafting: how trained drafters draft. Rejection sampling is refused: what it draws depends on the schedule.
        reuse_prefixes: keep the context of finished requests for later ones that begin alike.
        memory: bytes the caches may take; None for what the machine or the container has left.

    Raises:
        UsageError: a value outside its range.
    """

    rows: int = 8
    capacity: int | None = None
    queue: int = 64
    chunk: int = 128
    prefill_share: float = 1.0
    speculate: str | bool = "auto"
    drafting: DraftOptions = field(default_factory=DraftOptions)
    reuse_prefixes: bool = True
    memory: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("rows", 1, 1024), ("queue", 0, 100_000), ("chunk", 1, 4096)):
            object.__setattr__(self, name, whole(name, getattr(self, name), low, high))
        for name, low in (("capacity", 2), ("memory", 1)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole(name, getattr(self, name), low))
        share = real(self.prefill_share)
        if share is None or not 0 < share < 1e6:
            raise UsageError(f"prefill_share={self.prefill_share!r}: give a number above 0, 1 for equal shares")
        if self.drafting.sampling == "rejection":
            raise UsageError(
                "a service does not draft by rejection sampling: its texts would depend on what runs beside them; "
                "use draft_sampling 'coupled' or 'greedy'"
            )
