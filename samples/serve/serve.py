"""Serve a bundle with OpenAI's API and ask it a question the way any client would.

    samples/serve/run.sh                  # builds the quickstart's bundle first; Ctrl-C stops the server
    python samples/serve/serve.py BUNDLE --once

While it runs, open the address it prints: a chat that colours every token by the drafter that proposed it.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

QUESTION = "Write a Python function that returns the largest number of a list, and explain it in two sentences."


def quickstart_bundle() -> Path:
    """The bundle of samples/quickstart, built if it is not there."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
    from quickstart import open_or_build

    directory = Path("bundles") / "smollm2-135m-fp32"
    open_or_build(directory, "fp32", None)
    return directory


def free_port() -> int:
    """A port nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Until the server takes requests; exits if it ends before that."""
    while server.poll() is None:
        try:
            with urlopen(f"{url}/health/ready", timeout=5):
                return
        except URLError:
            time.sleep(0.1)
    sys.exit(server.returncode or 1)


def ask(url: str, question: str, most: int) -> None:
    """Stream one answer to stdout, and its figures after it."""
    with urlopen(f"{url}/v1/models") as reply:
        model = json.load(reply)["data"][0]["id"]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": most,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    usage = {}
    began = time.perf_counter()
    with urlopen(request) as reply:
        for line in reply:
            data = line.decode().removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                print(choice["delta"].get("content") or "", end="", flush=True)
    seconds = time.perf_counter() - began
    details = usage["completion_tokens_details"]
    print(
        f"\n\n[{usage['completion_tokens']} tokens in {seconds:.2f} s; drafts accepted: "
        f"{details['accepted_prediction_tokens']}, rejected: {details['rejected_prediction_tokens']}]"
    )


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, help="a bundle (default: the quickstart's)")
    parser.add_argument("--port", type=int, default=0, help="0 for any free one")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--max-new-tokens", type=int, default=120)
    parser.add_argument("--once", action="store_true", help="stop the server after the answer")
    arguments = parser.parse_args()
    bundle = arguments.bundle or quickstart_bundle()
    port = arguments.port or free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "dspark_export.cli.main", "serve", str(bundle), "--port", str(port)]
    server = subprocess.Popen([*command, "--log-level", "warning"], stdout=sys.stderr)
    try:
        wait_until_ready(url, server)
        print(f"> {arguments.question}\n")
        ask(url, arguments.question, arguments.max_new_tokens)
        if not arguments.once:
            print(f"\nThe server goes on at {url}; open it in a browser, or press Ctrl-C to stop it.", flush=True)
            server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
    return server.wait()


if __name__ == "__main__":
    sys.exit(main())
