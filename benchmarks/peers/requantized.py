"""A GGUF file in another type: every matrix dequantized and stored again, everything else copied."""

from __future__ import annotations

from pathlib import Path

import numpy as np

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")


def requantize(source: Path, target: Path, kind: str) -> None:
    """Write ``source`` to ``target`` with matrices of ``kind``, those of embedding and head included.

    A matrix whose rows the type's blocks do not divide becomes F16. Vectors stay as they are.
    """
    import gguf

    wanted = gguf.GGMLQuantizationType[kind]
    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    skipped = ("GGUF.", "general.architecture", "general.quantization_version", "general.file_type")
    for name, field in reader.fields.items():
        if not name.startswith(skipped):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"] if kind != "F32" else gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        matrix = values.ndim == 2
        fits = matrix and values.shape[1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
        stored = wanted if fits else gguf.GGMLQuantizationType.F16 if matrix else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(values.astype(np.float32), stored)
        writer.add_tensor(tensor.name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
