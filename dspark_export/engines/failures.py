"""Turns a compiler's complaint into an error that names node and tensor and says what to do."""

from __future__ import annotations

import re
from typing import Any

from dspark_export.engines.prepare import NodeFacts, PreparedGraph
from dspark_runtime.errors import (
    AttentionNotFused,
    CompilerCrashed,
    CompilerMissing,
    EngineBuildError,
    UnsupportedNode,
)

_DISTRIBUTIONS = {"tensorrt-rtx": "tensorrt-rtx-cu13", "tensorrt": "tensorrt"}
_NOISE = re.compile(r"\[checkMacros\.cpp::catchCudaError.*|Invalid Node - \S+|^(ITensor|I\w+)::\w+: Error Code \d+: ")
_WHERE = re.compile(r" ?\(?In \w+ at /_src/.*$|In validate at .*$")


def explain(graph: PreparedGraph, flavour: str, failure: dict[str, Any]) -> Exception:
    """The error for a ``failed`` event of the compiler's process."""
    message = failure["message"]
    if failure["kind"] == "missing":
        return compiler_missing(flavour, message)
    if failure["kind"] == "plugins":
        return EngineBuildError(f"graph {graph.name} cannot get its plugins: {message}")
    if failure["kind"] == "parse" and failure["nodes"]:
        return _refused_node(graph, flavour, failure["nodes"])
    if "Attention operation was not supported by a dedicated kernel" in message:
        return _no_fused_kernel(graph, flavour, message)
    if "Quantized constant" in message and ".rows." in message:
        return EngineBuildError(
            f"{flavour} cannot compile graph {graph.name}: it cannot look up rows of the quantized embedding. Build "
            "the bundle again with --no-quantize-embedding"
        )
    name = _mentioned(graph, message)
    facts = graph.nodes.get(name)
    where = f" at node {name} ({facts.operator}{_tensors(facts)})" if facts else ""
    return EngineBuildError(
        f"{flavour} cannot compile graph {graph.name}{where}: {_first_line(message)}. "
        f"{_advice(facts.operator if facts else '')}; --debug shows all it said"
    )


def compiler_missing(flavour: str, message: str) -> CompilerMissing:
    """The error for a flavour that is not installed."""
    return CompilerMissing(
        f"engines of {flavour} need its compiler, which is not installed ({message}); "
        f"run `pip install {_DISTRIBUTIONS.get(flavour, flavour)} polygraphy`"
    )


def crashed(graph: PreparedGraph, flavour: str, code: int, stderr: str) -> CompilerCrashed:
    """The error for a process that ended without an answer."""
    last = next((line for line in reversed(stderr.splitlines()) if line.strip()), "it said nothing")
    how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
    hint = "; it may have run out of memory" if code == -9 else ""
    return CompilerCrashed(f"the compiler of {flavour} {how} on graph {graph.name}{hint}: {last.strip()}")


def _refused_node(graph: PreparedGraph, flavour: str, nodes: list[dict[str, str]]) -> UnsupportedNode:
    first = nodes[0]
    facts = graph.nodes.get(first["name"])
    operator = first["operator"] or (facts.operator if facts else "an operator")
    why = _first_line(first["message"])
    if first["code"].startswith("UNSUPPORTED") or why in ("", "false"):
        why = f"it has no {operator} with these inputs"
    more = f" (and {len(nodes) - 1} more nodes)" if len(nodes) > 1 else ""
    return UnsupportedNode(
        f"{flavour} does not take node {first['name'] or '(unnamed)'} ({operator}{_tensors(facts)}) of graph "
        f"{graph.name}{more}: {why}. {_advice(operator)}"
    )


def _advice(operator: str) -> str:
    if operator == "TensorScatter":
        return (
            "A cache has to be a direct input, its update a direct output, and its length fixed: "
            "build the bundle again with this version"
        )
    if operator == "Attention":
        return "Queries, keys and values need the widths and types the contract gives them: build the bundle again"
    if operator == "TopK":
        return "TensorRT sorts at most 3840 numbers: take --plugins library or aot, or leave the graph out with --graph"
    return "Build the bundle again with this version, or leave the graph out with --graph"


def _no_fused_kernel(graph: PreparedGraph, flavour: str, message: str) -> AttentionNotFused:
    named = next((name for name in graph.attention if name in message), None)
    name = named or (graph.attention[0] if graph.attention else "(unnamed)")
    which = f"attention {name}" if named else f"one of {len(graph.attention)} attentions, the first of them {name},"
    return AttentionNotFused(
        f"{flavour} has no fused kernel for {which}{_tensors(graph.nodes.get(name), before=' tensor')} of graph "
        f"{graph.name}, and unfused attention would be slow and not exact. Fused are float16 and bfloat16 with heads "
        "of at most 256 numbers; run this model with ONNX Runtime, or leave the graph out with --graph"
    )


def _mentioned(graph: PreparedGraph, message: str) -> str:
    """The longest node name that occurs in ``message``, empty if none does."""
    names = [name for name in graph.nodes if re.search(rf"(?<![\w/.]){re.escape(name)}(?![\w/])", message)]
    return max(names, key=len, default="")


def _tensors(facts: NodeFacts | None, before: str = ", tensor") -> str:
    return f"{before} {facts.outputs[0]}" if facts is not None and facts.outputs else ""


def _first_line(message: str) -> str:
    """The first line with content, without source locations of the compiler and without remarks on a missing GPU."""
    for line in message.splitlines():
        text = _WHERE.sub("", _NOISE.sub("", line.strip())).strip(" ().")
        if text:
            return text
    return message.strip()
