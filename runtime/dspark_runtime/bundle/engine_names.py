"""Words of the manifest about engines and the project's TensorRT plugins; docs/plugins.md has the plugins' contract."""

from __future__ import annotations

from typing import Literal, get_args

Flavour = Literal["tensorrt", "tensorrt-rtx"]
HardwareCompatibility = Literal["none", "ampere-plus", "same-compute-capability"]

PluginForm = Literal["none", "library", "aot"]
"""How an engine computes a node of the domain ``dspark``: its ONNX function inlined, a plugin of the library, or a
kernel embedded in the plan."""

PluginName = Literal["VerifyTree", "VerifyChain", "DraftBlock", "CompactCache"]

NAMESPACE = "dspark"
VERSION = "1"
"""Version of every plugin, DSPARK_PLUGIN_VERSION of plugins/include/dspark/version.h: inputs, outputs and meaning."""

NAMES: tuple[PluginName, ...] = get_args(PluginName)
