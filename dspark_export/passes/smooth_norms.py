"""Moves the magnitude of single channels from a norm's output to the products that read it, by powers of two.

A product of 8-bit activations has one scale for all channels of a row, so that one large channel leaves few steps for
the others. Its magnitude can move to the weights instead, which have more room (SmoothQuant, Xiao et al. 2023): the
norm's gain is divided by a factor for each channel, the rows of the weights are multiplied by it. Factors are powers of
two here, so every number the graph computes after the products is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from dspark_export.passes import match

NORMS = ("RMSNormalization", "SkipSimplifiedLayerNormalization")


class SmoothNorms(ir.passes.InPlacePass):
    """Applies ``exponents``: int8 [channels] by the name of a norm's gain, for norms of :func:`norms_of_products`.

    Gains of channel c are divided by ``2 ** exponents[c]``. Norms that the graph does not have are left out.
    """

    def __init__(self, exponents: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        self._exponents = exponents

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether a norm was changed."""
        changed = 0
        for gain, weights in norms_of_products(model).items():
            if gain in self._exponents:
                factors = np.exp2(self._exponents[gain].astype(np.float32))
                _multiply(model.graph.initializers[gain], 1 / factors)
                for weight in weights:
                    _multiply(model.graph.initializers[weight], factors[:, None])
                changed += 1
        return ir.passes.PassResult(model, modified=changed > 0)


def norms_of_products(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """Gains of the norms that only matrix products read, and the weights [channels, outputs] of these, by name.

    None of these tensors is read by anything else.
    """
    found = {}
    for node in model.graph:
        gain = gain_of(node)
        if gain is None or not _read_once(gain) or node.outputs[0].is_graph_output():
            continue
        readers = [use.node for use in node.outputs[0].uses()]
        weights = [reader.inputs[1] for reader in readers if reader.op_type == "MatMul"]
        fit = [w for w in weights if w is not None and _read_once(w) and match.rank(w) == 2]
        if readers and len(fit) == len(readers):
            found[str(gain.name)] = tuple(str(weight.name) for weight in fit)
    return found


def gain_of(node: ir.Node | None) -> ir.Value | None:
    """The stored gain of a root-mean-square norm; None for other nodes and for gains that are computed."""
    if node is None or node.op_type not in NORMS:
        return None
    gain = node.inputs[NORMS.index(node.op_type) + 1]
    return gain if gain is not None and gain.is_initializer() and gain.const_value is not None else None


def _read_once(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and len(list(value.uses())) == 1


def _multiply(value: ir.Value, factors: np.ndarray) -> None:
    tensor = value.const_value
    assert tensor is not None

    def multiplied() -> ir.Tensor[np.ndarray]:
        array = tensor.numpy()
        return ir.Tensor(array * factors.astype(array.dtype), dtype=tensor.dtype, name=tensor.name)

    value.const_value = ir.LazyTensor(multiplied, dtype=tensor.dtype, shape=ir.Shape(tensor.shape), name=tensor.name)
