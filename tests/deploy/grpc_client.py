"""Asks a Triton server with tritonclient, in an environment of its own: ``grpc_client.py ADDRESS MODEL``.

Reads one command per line: ``{"id": ..., "inputs": {...}, "timeout_us": ...}`` asks, all requests over one stream, and
``"cancel"`` cancels the stream. Writes one line per response: ``{"id": ..., "outputs": {...}}``, or ``{"error": ...}``
for what ended without one.
"""

import json
import sys

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput

TYPES = {
    **dict.fromkeys(("text_input", "messages", "stop_words"), ("BYTES", np.object_)),
    **dict.fromkeys(("stream", "ignore_eos", "return_num_input_tokens", "return_num_output_tokens"), ("BOOL", bool)),
    **dict.fromkeys(("max_tokens", "input_ids", "top_k"), ("INT32", np.int32)),
    "seed": ("UINT64", np.uint64),
}


def tensor(name, value):
    kind, numpy_type = TYPES.get(name, ("FP32", np.float32))
    values = value if isinstance(value, list) else [value]
    array = np.array([[v.encode() if isinstance(v, str) else v for v in values]], dtype=numpy_type)
    made = InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array)
    return made


def plain(array):
    return [value.decode() if isinstance(value, bytes) else value for value in array.reshape(-1).tolist()]


def say(result, error):
    if error is not None:
        line = {"error": str(error)}
    else:
        response = result.get_response()
        outputs = {output.name: plain(result.as_numpy(output.name)) for output in response.outputs}
        line = {"id": response.id, "outputs": outputs}
    print(json.dumps(line), flush=True)


def main(address, model):
    with InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: say(result, error))
        for line in sys.stdin:
            command = json.loads(line)
            if command == "cancel":
                client.stop_stream(cancel_requests=True)
                continue
            inputs = [tensor(name, value) for name, value in command["inputs"].items()]
            client.async_stream_infer(model, inputs, request_id=command["id"], timeout=command.get("timeout_us"))


main(*sys.argv[1:])
