"""What Triton loads: puts the runtime where Python finds it, and names the model."""

import os
import sys

# The interpreter inside Triton may be an isolated one, which does not read PYTHONPATH itself.
sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]

import triton_python_backend_utils  # noqa: E402

from dspark_serve.triton.model import ServiceModel  # noqa: E402


class TritonPythonModel(ServiceModel):
    """See :class:`ServiceModel`."""

    pb_utils = triton_python_backend_utils
