"""Real inputs and a comparison script for those who work with plain Polygraphy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from polygraphy.json import save_json

from dspark_export.prompts.sets import SHIPPED, load_sets
from dspark_export.prompts.texts import encode
from dspark_export.validate.activations import record
from dspark_export.validate.numerics import cache_shapes, quiet
from dspark_export.validate.references import GraphRunner
from dspark_runtime import Bundle
from dspark_runtime.errors import BundleNotWritten

_LOADER = '''"""Real passes of the target of {bundle}: a data loader for Polygraphy.

polygraphy run {graph} --onnxrt --data-loader-script {loader}
"""

from pathlib import Path

from polygraphy.json import load_json

INPUTS = Path(__file__).with_name("inputs.json")


def load_data():
    """Yield the inputs of every pass by name: {passes}."""
    yield from load_json(str(INPUTS))
'''

_SCRIPT = '''"""Compare two forms of the target of {bundle} on real inputs.

python {script} [SECOND.onnx]

Give another graph with the same inputs, or a plan (.plan, .engine), to compare it with the bundle's own.
"""

import sys
from pathlib import Path

from data_loader import load_data
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator, CompareFunc

FIRST = {graph!r}
SECOND = {second!r}
LIMIT = {limit}


def runner(path):
    """A runner of an ONNX file or of a TensorRT plan."""
    if Path(path).suffix in (".plan", ".engine"):
        from polygraphy.backend.common import BytesFromPath
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner

        return TrtRunner(EngineFromBytes(BytesFromPath(path)), name=Path(path).name)
    return OnnxrtRunner(SessionFromOnnx(path), name=Path(path).name)


def main():
    """0 if all outputs of all passes agree."""
    second = sys.argv[1] if len(sys.argv) > 1 else SECOND
    results = Comparator.run([runner(FIRST), runner(second)], data_loader=list(load_data()))
    compare = CompareFunc.simple(atol=LIMIT, rtol=LIMIT, check_error_stat="max")
    return 0 if bool(Comparator.compare_accuracy(results, compare_func=compare)) else 1


if __name__ == "__main__":
    sys.exit(main())
'''


def write_script(bundle: Path, folder: Path, prompts: Sequence[str], threads: int | None) -> list[Path]:
    """Write ``inputs.json``, ``data_loader.py`` and ``compare.py`` into ``folder``; returns their paths.

    The inputs are those of one prompt's passes through the target, with the caches of the passes before.

    Raises:
        BundleNotWritten: the folder cannot be written to.
    """
    opened = Bundle.open(bundle, threads=threads)
    item = load_sets(list(prompts or SHIPPED[-1:]), 1)[0]
    ids = encode(opened, item.text)
    ids = [*ids, *opened.generate(ids, max_new_tokens=24, speculate="off", ignore_eos=True).tokens][:64]
    graph = opened.files.graph("target", prefer=("onnxruntime-cpu",))
    standard = opened.files.graph("target")
    path = opened.files.path(graph.file)
    second = path if standard.dtype != graph.dtype else opened.files.path(standard.file)
    running = GraphRunner(path, "target", threads)
    with quiet(), running:
        passes = record(running.whole, ids, cache_shapes(graph))
    files = {
        "inputs.json": folder / "inputs.json",
        "loader": folder / "data_loader.py",
        "script": folder / "compare.py",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            save_json([dict(one.feeds) for one in passes], str(files["inputs.json"]))
        files["loader"].write_text(
            _LOADER.format(
                bundle=opened.files.root.name,
                graph=path,
                loader=files["loader"],
                passes=", ".join(one.name for one in passes),
            ),
            "utf-8",
        )
        quantized = opened.manifest.precision.quantized
        files["script"].write_text(
            _SCRIPT.format(
                bundle=opened.files.root.name,
                script=files["script"],
                graph=str(path),
                second=str(second),
                limit=1e-1 if quantized else 1e-3,
            ),
            "utf-8",
        )
    except OSError as error:
        raise BundleNotWritten(f"cannot write into {folder}: {error.strerror or error}") from error
    return list(files.values())
