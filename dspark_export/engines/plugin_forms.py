"""The forms that nodes of the domain ``dspark`` can take in an engine.

They are interchangeable node for node, with the same name, inputs and outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common

from dspark_runtime.bundle.engine_names import NAMES, NAMESPACE, VERSION, PluginForm


@dataclass(frozen=True)
class Plugins:
    """A form that is available here: ``library`` is its file, ``ptx`` the text of the kernels."""

    form: PluginForm
    library: Path | None = None
    ptx: str = ""

    def request(self, used: dict[str, str]) -> dict[str, Any]:
        """What the compiler's process has to know of it; ``used``: versions of the graph's plugins by name."""
        library = None if self.library is None else str(self.library)
        return {"form": self.form if used else "none", "library": library, "ptx": self.ptx, "names": used}


INLINED = Plugins("none")


def apply_plugins(model: ir.Model, form: PluginForm) -> dict[str, str]:
    """Give the nodes of the domain ``dspark`` the form; returns the version of every plugin the graph uses, by name.

    Calls of functions that are not plugins are inlined in every form.
    """
    if form == "none":
        _inline_all(model)
        return {}
    used: dict[str, str] = {}
    for node in model.graph:
        if node.domain == NAMESPACE and node.op_type in NAMES:
            # How TensorRT's parser finds a plugin for a node it has no importer for.
            node.attributes["plugin_version"] = ir.AttrString("plugin_version", VERSION)
            node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", NAMESPACE)
            used[node.op_type] = VERSION
    for key in [key for key in model.functions if key[1] in used]:
        del model.functions[key]
    _inline_all(model)
    return used


def _inline_all(model: ir.Model) -> None:
    common.InlinePass()(model)
    model.functions.clear()
