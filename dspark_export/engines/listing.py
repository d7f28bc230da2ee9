"""Reads what TensorRT-RTX prints about a finished engine, which works without a GPU, where no engine can be loaded.

The text lists the layers, profile by profile, then the tensors with their shape ranges::

    Name: _gemm_mha_v2_myl0_15, LayerType: kgen, Inputs: [ { Name: ... }], ..., Metadata: [ONNX Layer: node_attention]
    ...
    I/O Tensors:
     Name: input_ids, IOMode: Input, ..., ProfileInfo: [ { MinShape: [1,1], OptShape: [1,8], MaxShape: [4,16], ... } ]
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), (?P<rest>.*)$")
_TENSOR = re.compile(r"^ Name: (?P<name>.*?), IOMode: (?P<mode>\w+), (?P<rest>.*)$")
_TENSORS = "I/O Tensors:"
_SUBGRAPH = re.compile(r"_myl(\d+)_\d+$")
_NAMES = re.compile(r"\{ Name: (.*?), Dimensions:")
_NODES = re.compile(r"\[ONNX Layer: (.*?)\]")
_SUFFIX = re.compile(r" \[profile \d+\]$")
_RANGE = re.compile(r"MinShape: \[([\d,]*)\], OptShape: \[([\d,]*)\], MaxShape: \[([\d,]*)\]")


@dataclass(frozen=True)
class Layer:
    """One layer of an engine: the tensors it reads and writes, and the ONNX nodes it came from."""

    name: str
    kind: str
    profile: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """A finished engine. ``shapes[tensor]`` has smallest, typical and largest shape per profile, for inputs only."""

    layers: tuple[Layer, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: dict[str, list[list[list[int]]]]


def read_listing(text: str) -> Listing:
    """Parse the compiler's text; lines of another form are left out, so that an empty text gives an empty engine."""
    head, _, tail = text.partition(_TENSORS)
    tensors = list(_tensors(tail))
    profiles = max((len(shapes) for _, _, shapes in tensors), default=1)
    return Listing(
        tuple(_layers(head, max(1, profiles))),
        tuple(name for name, mode, _ in tensors if mode == "Input"),
        tuple(name for name, mode, _ in tensors if mode == "Output"),
        {name: shapes for name, mode, shapes in tensors if mode == "Input"},
    )


def from_engine(facts: dict[str, Any]) -> Listing:
    """The same from a loaded engine: its inspector's layers, its aliases and its shape ranges.

    An alias is written as TensorRT-RTX lists it: the input's name stands for nothing in the engine.
    """
    names = {source: output for output, source in facts["aliases"].items() if source}
    layers = []
    for layer in facts["layers"]:
        name = str(layer.get("Name", ""))
        suffix = re.search(r" \[profile (\d+)\]", name)
        layers.append(
            Layer(
                f"{name} {layer.get('TacticName', '')}",
                str(layer.get("LayerType", "")),
                int(suffix[1]) if suffix else 0,
                tuple(names.get(t, t) for t in (_SUFFIX.sub("", i["Name"]) for i in layer.get("Inputs", []))),
                tuple(names.get(t, t) for t in (_SUFFIX.sub("", o["Name"]) for o in layer.get("Outputs", []))),
                tuple(_NODES.findall(str(layer.get("Metadata", "")))),
            )
        )
    return Listing(tuple(layers), tuple(facts["shapes"]), tuple(facts["aliases"]), facts["shapes"])


def _layers(text: str, profiles: int) -> Iterator[Layer]:
    """Layers are numbered by subgraph. Every profile has the same number of those, one profile after the other."""
    found = [match for line in text.splitlines() if (match := _LAYER.match(line))]
    numbers = [int(part[1]) if (part := _SUBGRAPH.search(match["name"])) else 0 for match in found]
    subgraphs = max(numbers, default=0) + 1
    for match, number in zip(found, numbers, strict=True):
        before, _, after = match["rest"].partition("Outputs: [")
        yield Layer(
            match["name"],
            match["kind"],
            number * profiles // subgraphs,
            tuple(_SUFFIX.sub("", name) for name in _NAMES.findall(before)),
            tuple(_SUFFIX.sub("", name) for name in _NAMES.findall(after)),
            tuple(_NODES.findall(match["rest"])),
        )


def _tensors(text: str) -> Iterator[tuple[str, str, list[list[list[int]]]]]:
    for line in text.splitlines():
        if found := _TENSOR.match(line):
            ranges = _RANGE.findall(found["rest"])
            yield found["name"], found["mode"], [[_dims(shape) for shape in profile] for profile in ranges]


def _dims(text: str) -> list[int]:
    return [int(dim) for dim in text.split(",") if dim]
