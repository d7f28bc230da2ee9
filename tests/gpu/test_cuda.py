"""What needs a CUDA device: ONNX Runtime's CUDA provider runs the operators of the graph contract.

Bundles run on the CPU in this version; this is what `dspark-export doctor` reports about the provider, as a test.
"""

from __future__ import annotations

import json

import onnxruntime
import pytest
from typer.testing import CliRunner

from dspark_export.cli.main import app

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
        reason="needs a CUDA device and onnxruntime-gpu (extra `gpu`); the installed onnxruntime has no CUDA provider",
    ),
]


def test_doctor_runs_an_opset_24_graph_on_the_cuda_provider() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = {backend["name"]: backend for backend in json.loads(result.stdout)["backends"]}
    assert found["ONNX Runtime, CUDA"]["works"], found["ONNX Runtime, CUDA"]["detail"]
