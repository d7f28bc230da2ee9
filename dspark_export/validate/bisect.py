"""Finds the first node of a graph that does not compute what the same node of a clean graph computes.

Every value both graphs have under one name is marked as an output; both run on the same inputs.
"""

from __future__ import annotations

import ast
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from dspark_export.validate.references import session
from dspark_export.validate.tolerances import largest_relative
from dspark_runtime.arrays import AnyArray

_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Culprit:
    """A node: its name and operator, the value it got wrong, and where it is in the model's own terms."""

    node: str
    operator: str
    value: str
    scope: str
    measured: float

    def __str__(self) -> str:
        return f"{self.scope}: {self.operator} {self.node}"


def first_difference(
    graph: Path, clean: Path, feeds: dict[str, AnyArray], limit: float, threads: int | None
) -> Culprit | None:
    """The first node, in order of computation, whose value differs by more than ``limit``, or by far more than before.

    None if all values that both graphs have agree.
    """
    tested, reference = (onnx.load(path, load_external_data=False) for path in (graph, clean))
    theirs = {name for node in reference.graph.node for name in node.output}
    inner = [name for node in tested.graph.node for name in node.output if name and name in theirs]
    found, wanted = _values(tested, graph, inner, feeds, threads), _values(reference, clean, inner, feeds, threads)
    for node in tested.graph.node:
        for name in node.output:
            if name not in found or found[name].dtype.kind != "f":
                continue
            same = found[name] == wanted[name] if found[name].shape == wanted[name].shape else np.zeros(1, np.bool_)
            if same.all():  # infinities of masks too
                continue
            off = largest_relative(np.where(same, 0, found[name]), np.where(same, 0, wanted[name]))
            if off > limit / 10:  # inner values have not been amplified yet
                return Culprit(node.name, node.op_type, name, _scope(node), off)
    return None


def _values(
    model: onnx.ModelProto, path: Path, names: list[str], feeds: dict[str, AnyArray], threads: int | None
) -> dict[str, AnyArray]:
    """All named values of a pass. Weights stay in their file."""
    have = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in have)
    with tempfile.TemporaryDirectory(dir=path.parent.parent) as folder:
        for data in {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}:
            _link(path.parent / data, Path(folder) / data)
        marked = Path(folder) / "marked.onnx"
        onnx.save(model, marked)
        running = session(marked, threads, optimized=False)
        wanted = {value.name for value in running.get_inputs()}
        values = running.run(names, {name: array for name, array in feeds.items() if name in wanted})
        return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _scope(node: onnx.NodeProto) -> str:
    """The module a node was traced from, or the weight it reads."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            modules = [scope for scope in ast.literal_eval(entry.value)[:-1] if scope]
            if modules:
                return str(modules[-1])
    weights = [name for name in node.input if name.endswith((".weight", ".bias"))]
    return weights[0] if weights else "the graph"
