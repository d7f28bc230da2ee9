"""Checks of a finished engine: attention fused, caches updated in place, shape ranges as requested."""

from __future__ import annotations

from typing import Any

from dspark_export.engines.listing import Listing, from_engine, read_listing
from dspark_export.engines.prepare import PreparedGraph
from dspark_runtime.bundle.engine_entry import EngineInspection
from dspark_runtime.errors import AttentionNotFused, CacheNotInPlace, EngineBuildError, ProfileMismatch

_FUSED = ("mha", "attention")


def inspect(graph: PreparedGraph, done: dict[str, Any]) -> EngineInspection:
    """What the compiler reports of the engine of ``graph``; ``done`` is its answer.

    Raises:
        AttentionNotFused: an attention node has no fused kernel in some profile.
        CacheNotInPlace: a cache output does not alias its input.
        ProfileMismatch: shape ranges are not those that were requested.
    """
    network = done["network"]
    if network["decomposable"] or network["attention"] != len(graph.attention):
        raise AttentionNotFused(
            f"graph {graph.name} has {len(graph.attention)} attention nodes, of which the compiler took "
            f"{network['attention']} as such and {network['decomposable']} as decomposable; use another version of it"
        )
    for output, source in graph.caches.items():
        if network["caches"].get(output) != source:
            raise CacheNotInPlace(
                f"cache output {output} of graph {graph.name} is not an in-place update of {source}: the compiler "
                f"sees it come from {network['caches'].get(output, 'something else')}; nothing may stand between"
            )
    listing = read_listing(done["listing"]) if done["engine"] is None else from_engine(done["engine"])
    if not listing.layers:
        raise EngineBuildError(f"the compiler did not list the layers of graph {graph.name}; use another version of it")
    _check_attention(graph, listing)
    _check_aliases(graph, listing)
    _check_ranges(graph, listing)
    profiles = range(len(graph.shapes))
    return EngineInspection(
        attention=len(graph.attention),
        softmax=network["softmax"],
        aliased=len(graph.caches),
        layers=tuple(sum(layer.profile == profile for layer in listing.layers) for profile in profiles),
    )


def _check_attention(graph: PreparedGraph, listing: Listing) -> None:
    for profile, name in enumerate(graph.shapes):
        fused = {
            node
            for layer in listing.layers
            if layer.profile == profile and any(word in layer.name for word in _FUSED)
            for node in layer.nodes
        }
        if missing := [node for node in graph.attention if node not in fused]:
            raise AttentionNotFused(
                f"graph {graph.name}, profile {name}: attention {missing[0]} has no fused kernel "
                f"({len(missing)} of {len(graph.attention)}); use another version of the compiler"
            )


def _check_aliases(graph: PreparedGraph, listing: Listing) -> None:
    """A cache that is updated in place has one name in the finished engine: that of its output."""
    used = {name for layer in listing.layers for name in (*layer.inputs, *layer.outputs)}
    for output, source in graph.caches.items():
        if source in used or output not in used:
            raise CacheNotInPlace(
                f"the engine of graph {graph.name} reads {source} and writes {output} as two tensors: the cache would "
                "be copied in every pass; use another version of the compiler"
            )


def _check_ranges(graph: PreparedGraph, listing: Listing) -> None:
    for place, (profile, shapes) in enumerate(graph.shapes.items()):
        for name, wanted in shapes.items():
            found = listing.shapes.get(name, [])
            if place >= len(found) or found[place] != wanted:
                have = found[place] if place < len(found) else "nothing"
                raise ProfileMismatch(
                    f"profile {profile} of the engine of graph {graph.name} takes {have} for input {name}, "
                    f"asked for were {wanted} (smallest, typical, largest); use another version of the compiler"
                )
