"""Weights as the model takes them, made of stored tensors when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_export.checkpoints.safetensors_file import StoredTensor

if TYPE_CHECKING:
    import torch

    from dspark_export.grids import Grid

Found = Mapping[str, tuple[Path, StoredTensor]]
"""Every stored tensor with its file."""


@dataclass(frozen=True)
class Recipe:
    """One weight: its shape, the tensors it is made of by their roles, and how; ``make`` None: the only one, as is.

    ``grid``: what gives its integers, where it is stored as such.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, str]
    make: Callable[[Mapping[str, torch.Tensor]], torch.Tensor] | None = None
    grid: Callable[[Mapping[str, torch.Tensor]], Grid] | None = None

    def made_of(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight, from tensors by their stored names."""
        parts = {role: stored[name] for role, name in self.parts.items()}
        return self.make(parts) if self.make else parts["weight"]


@dataclass(frozen=True)
class Recipes:
    """All weights by name; ``excused``: stored tensors that none of them needs, with the reason."""

    weights: Mapping[str, Recipe]
    excused: Mapping[str, str]


def as_stored(found: Found) -> Recipes:
    """Every tensor is a weight."""
    return Recipes({name: Recipe(stored.shape, {"weight": name}) for name, (_, stored) in found.items()}, {})


class _Made:
    """What transformers slices to read a weight: ``[...]`` reads its parts and puts them together."""

    def __init__(self, recipe: Recipe, slices: Mapping[str, Any]) -> None:
        self._recipe, self._slices = recipe, slices

    def __getitem__(self, _: Any) -> torch.Tensor:
        assert self._recipe.make is not None
        return self._recipe.make({role: self._slices[name][...] for role, name in self._recipe.parts.items()})


def open_weights(weights: Mapping[str, Recipe], found: Found) -> dict[str, Any]:
    """``weights`` as slices: ``[...]`` reads one."""
    slices = open_tensors(found, {part for recipe in weights.values() for part in recipe.parts.values()})
    return {
        name: slices[recipe.parts["weight"]] if recipe.make is None else _Made(recipe, slices)
        for name, recipe in weights.items()
    }


def read_grid(recipe: Recipe, found: Found) -> Grid:
    """The integers of a weight that has a ``grid``; NotHeld where they are not in blocks."""
    assert recipe.grid is not None
    slices = open_tensors(found, recipe.parts.values())
    return recipe.grid({role: slices[name][...] for role, name in recipe.parts.items()})


def open_tensors(found: Found, names: Iterable[str]) -> dict[str, Any]:
    """Stored tensors as slices of their files."""
    from safetensors import safe_open

    files: dict[Path, Any] = {}
    for name in names:
        path = found[name][0]
        if path not in files:
            files[path] = safe_open(path, "pt")
    return {name: files[found[name][0]].get_slice(name) for name in names}
