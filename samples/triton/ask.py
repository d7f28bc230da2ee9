"""Deploy a bundle to a Triton server on this machine, and ask it with the deployment's own client.

    python samples/triton/ask.py BUNDLE [QUESTION] [--raw]

The server is the one on the PATH, or that of the wheel ``nvidia-pytriton``, which is installed once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from dspark_export.deploy import triton_wheel
from dspark_export.deploy.check import READY
from dspark_export.deploy.contents import packages
from dspark_export.deploy.running import running
from dspark_runtime.backends.build_kernels import cache


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("question", nargs="?", default="Why do leaves change their colour in autumn?")
    parser.add_argument("--raw", action="store_true", help="the question is text to continue")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "deployment"
        command = [sys.executable, "-m", "dspark_export.cli.main", "deploy", str(given.bundle), "--target", "triton"]
        subprocess.run([*command, "--name", "sample", "--out", str(out)], check=True)
        server_folder = cache() / "triton"
        path = f"{triton_wheel.prepare(server_folder, packages('onnxruntime'))}{os.pathsep}{os.environ['PATH']}"
        with running([str(out / "start.sh")], {"PATH": path}, READY) as server:
            address = f"127.0.0.1:{server.ports['GRPC']}"
            asking = [str(triton_wheel.python_of(server_folder)), str(out / "client.py"), given.question]
            return subprocess.run([*asking, "--url", address, *["--raw"] * given.raw]).returncode


if __name__ == "__main__":
    sys.exit(main())
