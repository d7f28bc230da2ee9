"""The bundle on disk: its manifest and the safe way to open it.

A bundle is a folder with ``manifest.json`` and the files listed there, each with size and SHA-256. Opening it checks,
before any byte reaches an inference library:

* the manifest is strict JSON of a known schema version, without unknown keys;
* every listed path stays inside the bundle and is a regular file (no symlink on the way, no hard link);
* sizes, and digests unless switched off, match;
* ``onnx/`` holds nothing that is not listed, so an external-data reference of a graph can only reach a checked file.

Digests find damage and mix-ups. They are not a signature: anyone who can write the bundle can also write the manifest.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dspark_runtime.bundle.manifest import MANIFEST, GraphEntry, Manifest, Variant
from dspark_runtime.bundle.plan_errors import plan_error
from dspark_runtime.bundle.records import safe_relative_path
from dspark_runtime.errors import BundleError, DamagedBundle, IncompatibleBundle

TOKENIZER_DIR = "tokenizer"
GRAPH_DIR = "onnx"
ENGINE_DIR = "engines"
MANIFEST_MAX_BYTES = 16 * 2**20
_HASH_BLOCK = 4 * 2**20


def sha256_of(path: Path) -> str:
    """Hex digest of a file, streamed; a symlink is not followed where the system allows to say so."""
    digest = hashlib.sha256()
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_regular_file(root: Path, relative: str) -> os.stat_result:
    """lstat of ``root/relative``; DamagedBundle unless it is a regular, singly linked file reached without symlinks."""
    try:
        safe_relative_path(relative)
    except ValueError as error:
        raise DamagedBundle(str(error)) from error
    current = root
    parts = PurePosixPath(relative).parts
    for depth, part in enumerate(parts):
        current = current / part
        try:
            info = current.lstat()
        except OSError as error:
            raise DamagedBundle(f"{relative} is missing from the bundle {root}; build or copy it again") from error
        if stat.S_ISLNK(info.st_mode):
            raise DamagedBundle(f"{relative} of the bundle {root} is a symlink; copy the file itself into the bundle")
        if depth < len(parts) - 1 and not stat.S_ISDIR(info.st_mode):
            raise DamagedBundle(f"{relative} is missing from the bundle {root}; build or copy it again")
    if not stat.S_ISREG(info.st_mode):
        raise DamagedBundle(f"{relative} of the bundle {root} is not a regular file")
    if info.st_nlink > 1:
        raise DamagedBundle(
            f"{relative} of the bundle {root} is a hard link to a file elsewhere; copy it without links"
        )
    return info


def walk_files(root: Path) -> Iterator[str]:
    """Relative paths, sorted, of everything below ``root`` that is not a folder; symlinks are not entered."""
    for folder, folders, files in os.walk(root, followlinks=False):
        folders.sort()
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in sorted(files + linked):
            yield (Path(folder) / name).relative_to(root).as_posix()


@dataclass(frozen=True)
class BundleFiles:
    """An opened, checked bundle folder: its manifest and its paths."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> BundleFiles:
        """Read and check the bundle at ``path``; ``verify=False`` skips the digests, never the other checks.

        Raises BundleError if there is no bundle, DamagedBundle or IncompatibleBundle if it must not be used.
        """
        root = Path(path)
        if not root.is_dir():
            what = "is not a folder" if root.exists() else "does not exist"
            raise BundleError(f"bundle {root} {what}; make one with `dspark-export build MODEL --out {root}`")
        root = root.resolve()
        if not (root / MANIFEST).exists():
            raise BundleError(f"{root} has no {MANIFEST}, so it is not a bundle; make one with `dspark-export build`")
        if check_regular_file(root, MANIFEST).st_size > MANIFEST_MAX_BYTES:
            raise DamagedBundle(f"{root / MANIFEST} is larger than {MANIFEST_MAX_BYTES} bytes; build the bundle again")
        files = cls(root, Manifest.parse((root / MANIFEST).read_bytes(), str(root / MANIFEST)))
        files._check(verify)
        return files

    def _check(self, verify: bool) -> None:
        for relative, entry in self.manifest.files.items():
            size = check_regular_file(self.root, relative).st_size
            if size != entry.size:
                raise self._mismatch(relative, f"has {size} bytes, the manifest says {entry.size}")
        for name in walk_files(self.root / GRAPH_DIR):
            if f"{GRAPH_DIR}/{name}" not in self.manifest.files:
                raise DamagedBundle(f"{GRAPH_DIR}/{name} of the bundle {self.root} is not in its manifest; remove it")
        if verify:
            for relative, entry in self.manifest.files.items():
                if sha256_of(self.root / relative) != entry.sha256:
                    raise self._mismatch(relative, "was altered: its SHA-256 is not the manifest's")

    def _mismatch(self, relative: str, how: str) -> DamagedBundle:
        if all(relative != engine.file for engine in self.manifest.engines):
            return DamagedBundle(f"{relative} of the bundle {self.root} {how}; copy or build it again")
        entry, path = self.manifest.files[relative], self.root / relative
        return plan_error(relative, entry, path.stat().st_size, sha256_of(path), self.manifest)

    def path(self, relative: str) -> Path:
        """Absolute path of a listed file; DamagedBundle if the manifest does not list it."""
        if relative not in self.manifest.files:
            raise DamagedBundle(f"the bundle {self.root} has no file {relative}")
        return self.root / relative

    @property
    def tokenizer_dir(self) -> Path:
        """Folder with tokenizer.json and its companions."""
        return self.root / TOKENIZER_DIR

    def graph(self, name: str, prefer: Sequence[Variant] = ()) -> GraphEntry:
        """The graph ``name`` in the first variant of ``prefer`` there is, else the standard one.

        Raises IncompatibleBundle if there is none.
        """
        variants = {graph.variant: graph for graph in self.manifest.graphs if graph.name == name}
        for variant in (*prefer, "standard"):
            if variant in variants:
                return variants[variant]
        have = ", ".join(sorted({graph.name for graph in self.manifest.graphs}))
        raise IncompatibleBundle(
            f"the bundle {self.root} has no graph {name!r} (it has {have}); build it again with that graph"
        )

    def has_graph(self, name: str) -> bool:
        """Whether any variant of graph ``name`` is in the bundle."""
        return any(graph.name == name for graph in self.manifest.graphs)
