"""Compiles ONNX graphs to TensorRT and TensorRT-RTX engines.

The compiler runs in a separate process for every graph (``worker.py``): Polygraphy chooses its flavour once per
process, a crash in native code ends that process only, and its peak memory is the graph's. Nothing here needs a GPU for
TensorRT-RTX.
"""
