"""The integers of a checkpoint by the model's names of weights: what :mod:`.keep_blocks` stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dspark_export.grids import Form, Grid, NotHeld
from dspark_export.passes.pack_projections import GROUPS
from dspark_runtime.errors import ExportError

_NOT_READ = "is not read by a matrix product of its own, as the experts of a mixture are not"


class KeptWeights:
    """The integers of a checkpoint by the model's names of weights, read when they are needed.

    ``sources``: what reads each, or raises :class:`NotHeld`. ``aliases``: other names of the same weights, of tied
    embeddings. ``minima``: whether graphs may have blocks with a minimum, which the sequence kernels alone multiply.
    ``reasons`` says why weights could not be kept.
    """

    def __init__(
        self, sources: Mapping[str, Callable[[], Grid]], aliases: Mapping[str, str] | None = None, minima: bool = True
    ) -> None:
        self._sources, self._aliases, self._minima = sources, aliases or {}, minima
        self._forms: dict[str, Form | None] = {}
        self._last: tuple[str, Grid] | None = None
        self._kept: set[str] = set()
        self.reasons: dict[str, str] = {}

    def form(self, name: str) -> Form | None:
        """How the weight ``name`` would be stored; None where it is not stored as integers."""
        parts = self._parts(name)
        found = [self._form(part) for part in parts]
        return found[0] if found and all(form == found[0] for form in found) else None

    def grid(self, name: str) -> Grid:
        """The integers of a weight that has a form."""
        if self._last is None or self._last[0] != name:
            grids = [self._sources[part]().in_blocks() for part in self._parts(name)]
            self._last = name, grids[0] if len(grids) == 1 else _above_another(grids)
        return self._last[1]

    def alike(self, names: Sequence[str]) -> bool:
        """Whether weights can be packed into one."""
        forms = {self.form(name) for name in names}
        return len(forms) == 1

    def holds(self, name: str, weight: npt.NDArray[np.generic]) -> bool:
        """Whether the integers under ``name`` stand for ``weight`` [out, in], to the last bit."""
        found = self.grid(name).dequantized()
        held = found.shape == weight.shape and np.array_equal(found, weight.astype(np.float32))
        if not held:
            self._refuse(name, "is not what the model computes with")
        return held

    def keep(self, name: str) -> None:
        """``name`` is stored as integers."""
        self._kept |= set(self._parts(name))

    def not_kept(self) -> dict[str, str]:
        """Weights that the checkpoint has as integers and no graph does, with the reason."""
        return {name: self.reasons.get(name, _NOT_READ) for name in self._sources if name not in self._kept}

    def require_some(self) -> None:
        """ExportError if nothing at all is stored as integers."""
        if not self._kept:
            shown = "; ".join(f"{name}: {reason}" for name, reason in list(self.not_kept().items())[:2])
            raise ExportError(
                f"no weight can be stored as the checkpoint's integers ({shown}); choose another --precision"
            )

    @property
    def kept(self) -> frozenset[str]:
        """Names of the weights that are stored as integers."""
        return frozenset(self._kept)

    def _parts(self, name: str) -> list[str]:
        """Names of what was packed into ``name``; [] where the checkpoint has no integers of it."""
        if name not in self._sources:
            name = self._aliases.get(name, name)
        if name in self._sources:
            return [name]
        for packed, parts in GROUPS.items():
            if f".{packed}." in name:
                found = [name.replace(f".{packed}.", f".{part}.") for part in parts]
                return found if all(part in self._sources for part in found) else []
        return []

    def _form(self, name: str) -> Form | None:
        if name not in self._forms:
            try:
                form = self.grid(name).form()
                if form.minimum and not self._minima:
                    raise NotHeld("blocks with a minimum need the sequence kernels (--kernels)")
                self._forms[name] = form
            except NotHeld as reason:
                self._forms[name] = None
                self._refuse(name, str(reason))
        return self._forms[name]

    def _refuse(self, name: str, reason: str) -> None:
        self.reasons |= dict.fromkeys(self._parts(name), reason)


def _above_another(grids: list[Grid]) -> Grid:
    """Outputs of all ``grids``, which have one form."""
    zero, minimum = ([getattr(grid, part) for grid in grids] for part in ("zero", "minimum"))
    return Grid(
        np.concatenate([grid.codes for grid in grids]),
        np.concatenate([grid.scale for grid in grids]),
        None if any(part is None for part in zero) else np.concatenate(zero),
        None if any(part is None for part in minimum) else np.concatenate(minimum),
    )
