"""Asks the model over gRPC and prints the text as it comes: ``pip install "tritonclient[grpc]"``.

python client.py "Why is the sky blue?" [--url 127.0.0.1:8001] [--max-tokens 128] [--raw]
"""

import argparse
import json
import queue

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferResult


def tensor(name: str, kind: str, value: object) -> InferInput:
    """A tensor of one value, with its batch dimension."""
    array = np.array([[value]], dtype=object if kind == "BYTES" else None)
    made = InferInput(name, [1, 1], kind)
    made.set_data_from_numpy(array if kind == "BYTES" else array.astype({"BOOL": bool, "INT32": np.int32}[kind]))
    return made


def main() -> None:
    """Ask once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--url", default="127.0.0.1:8001")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--raw", action="store_true", help="the prompt is text to continue, not a question")
    given = parser.parse_args()
    messages = json.dumps([{"role": "user", "content": given.prompt}])
    prompt = ("text_input", given.prompt) if given.raw else ("messages", messages)
    inputs = [
        tensor(prompt[0], "BYTES", prompt[1].encode()),
        tensor("max_tokens", "INT32", given.max_tokens),
        tensor("stream", "BOOL", True),
    ]
    answers: queue.Queue[tuple[InferResult, Exception | None]] = queue.Queue()
    with InferenceServerClient(given.url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("{{ name }}", inputs)
        while True:
            result, error = answers.get()
            if error is not None:
                raise SystemExit(f"\n{error}")
            print(result.as_numpy("text_output")[0, 0].decode(), end="", flush=True)
            if (reason := result.as_numpy("finish_reason")) is not None:
                print(f"\n[{reason[0, 0].decode()}]")
                return


if __name__ == "__main__":
    main()
