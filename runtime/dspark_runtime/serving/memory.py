"""What a service's caches take, and what there is for them."""

from __future__ import annotations

from pathlib import Path

from dspark_runtime.backends.protocol import MOST_ROWS
from dspark_runtime.bundle.manifest import Manifest
from dspark_runtime.errors import CapacityError
from dspark_runtime.speculation.kv_cache import round_up

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def slot_bytes(manifest: Manifest) -> int:
    """Bytes of one token of context in the caches of the target and of every drafter that has its own."""
    target = next(graph for graph in manifest.graphs if graph.name == "target")
    own = {graph.name.removesuffix("-extend").removesuffix("-step"): graph for graph in manifest.graphs if graph.cache}
    layers = [(layer, target.dtype) for layer in manifest.model.cache]
    layers += [(layer, graph.dtype) for graph in own.values() for layer in graph.cache or ()]
    return sum(layer.kv_heads * (layer.key_dim + layer.value_dim) * _BYTES.get(dtype, 4) for layer, dtype in layers)


def cache_bytes(manifest: Manifest, rows: int, capacity: int) -> int:
    """Bytes of the caches of ``rows`` sequences of up to ``capacity`` tokens, once all of them were that long."""
    return rows * round_up(capacity + MOST_ROWS) * slot_bytes(manifest)


def memory_left() -> int | None:
    """Bytes this process may still take, by its control group and the machine; None where neither tells."""
    found = [_group_left(), _machine_left()]
    known = [value for value in found if value is not None]
    return min(known) if known else None


def check_memory(manifest: Manifest, rows: int, capacity: int, memory: int | None = None) -> int:
    """:func:`cache_bytes`, which fit into ``memory`` bytes, or what is left.

    Raises:
        CapacityError: they do not; the message has the most rows that would.
    """
    wanted, left = cache_bytes(manifest, rows, capacity), memory if memory is not None else memory_left()
    if left is not None and wanted > left:
        fitting = left // cache_bytes(manifest, 1, capacity)
        shorter = left // rows // slot_bytes(manifest) // 64 * 64 - MOST_ROWS
        advice = [f"{fitting} rows of that length" if fitting else "", f"{shorter} tokens each" if shorter > 64 else ""]
        fits = " or ".join(part for part in advice if part)
        raise CapacityError(
            f"the caches of {rows} rows of {capacity} tokens take {wanted / 2**30:.2f} GiB, and {left / 2**30:.2f} GiB "
            f"are left; {'there is room for ' + fits if fits else 'give the service more memory'}"
        )
    return wanted


def _group_left() -> int | None:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        reclaimable = _figure(Path("/sys/fs/cgroup/memory.stat").read_text(encoding="ascii"), "inactive_file ")
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(int(limit) - used + (reclaimable or 0), 0)


def _machine_left() -> int | None:
    try:
        found = _figure(Path("/proc/meminfo").read_text(encoding="ascii"), "MemAvailable:")
    except OSError:
        return None
    return None if found is None else found * 1024


def _figure(text: str, name: str) -> int | None:
    """The whole number behind ``name`` at the beginning of a line."""
    line = next((line for line in text.splitlines() if line.startswith(name)), "")
    words = line.removeprefix(name).split()
    return int(words[0]) if words else None
