"""Writes a bundle so that it is either complete or absent.

Files go to a hidden sibling ``.<name>.partial-<pid>`` of the wanted folder and are hashed, fsynced and renamed
into place at commit. A lock file ``.<name>.lock`` beside them keeps a second build out; the operating system drops
the lock of a killed build, and whoever holds the lock may remove what dead builds left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import filelock
import onnx_ir as ir

from dspark_runtime.bundle.files import BundleFiles, check_regular_file, sha256_of, walk_files
from dspark_runtime.bundle.manifest import MANIFEST, FileEntry, Manifest
from dspark_runtime.errors import BundleBusy, BundleError, BundleNotWritten, DamagedBundle, DsparkError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_REASONS = {
    errno.ENOSPC: "the disk is full; free space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free space or choose another folder",
    errno.EFBIG: "a file reached a size limit; raise the limit (ulimit -f) or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "permission denied; choose a folder you may write to",
    errno.ENOTDIR: "a part of that path is a file, not a folder; choose another folder",
    errno.ENAMETOOLONG: "that name is too long; choose a shorter one",
    errno.EIO: "the disk reported an input/output error",
}


class BundleWriter:
    """Context manager around one build into ``out``.

    Raises BundleBusy if another build holds the folder and BundleNotWritten if ``out`` exists (``overwrite`` replaces a
    bundle, never anything else) or cannot be written. Leaving the block without :meth:`commit` removes everything.
    """

    def __init__(self, out: str | os.PathLike[str], overwrite: bool = False) -> None:
        self.out = Path(os.path.abspath(out))
        self.overwrite = overwrite
        self.dir = self.out.parent / f".{self.out.name}.partial-{os.getpid()}"
        self._replaced = self.out.parent / f".{self.out.name}.replaced"
        self._lock_path = self.out.parent / f".{self.out.name}.lock"
        self._lock = filelock.FileLock(self._lock_path, timeout=0)
        self._committed = False
        self._made_parents: list[Path] = []
        self._hashed: dict[tuple[int, int, int], FileEntry] = {}

    def __enter__(self) -> BundleWriter:
        if not self.out.name:
            raise BundleNotWritten(f"cannot write a bundle to {self.out}; name a new folder")
        try:
            self._make_parents()
            self._lock.acquire()
        except filelock.Timeout as error:
            raise BundleBusy(
                f"another build is writing to {self.out}; wait until it ends, or choose another folder"
            ) from error
        except OSError as error:
            self._remove_made_parents()
            raise self._explain(error) from error
        try:
            self._remove_leftovers()
            self._check_free()
            self.dir.mkdir()
        except BaseException as error:
            self._release()
            if isinstance(error, OSError):
                raise self._explain(error) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._committed:
                shutil.rmtree(self.dir, ignore_errors=True)
        finally:
            self._release()
        if isinstance(error, Exception) and not isinstance(error, DsparkError):
            cause = self._write_failure(error)
            if cause is not None:
                raise self._explain(cause) from error

    def add(self, relative: str, content: bytes | str) -> Path:
        """Write one small file, e.g. a report; larger ones are written below :attr:`dir` by their makers."""
        path = self.dir / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def copy(self, files: BundleFiles) -> None:
        """Copy every file of a bundle but its manifest."""
        for relative in files.manifest.files:
            target = self.dir / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files.root / relative, target)

    def commit(self, manifest: Manifest) -> Manifest:
        """Hash and fsync every file, write the manifest and put the bundle in place; returns the manifest as written.

        ``manifest.files`` is replaced by what was really written. Raises BundleError if a graph refers to data outside
        the bundle or the manifest to files that do not exist.
        """
        try:
            manifest = self.preview(manifest)
            for relative in (*manifest.files, MANIFEST):
                _fsync(self.dir / relative)
            for folder, _, _ in os.walk(self.dir):
                _fsync(Path(folder))
            self._put_in_place()
        except OSError as error:
            raise self._explain(error) from error
        self._committed = True
        return manifest

    def preview(self, manifest: Manifest) -> Manifest:
        """Make :attr:`dir` a bundle that can be opened, to measure it before it is committed."""
        manifest = manifest.model_copy(update={"files": self._hash_files()})
        if missing := manifest.missing_references():
            raise BundleError(f"the build did not write {', '.join(missing)}")
        for graph in manifest.graphs:
            _check_external_data(self.dir, graph.file, set(graph.data_files))
        (self.dir / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return Manifest.parse((self.dir / MANIFEST).read_bytes())

    def _hash_files(self) -> dict[str, FileEntry]:
        entries = {}
        for relative in walk_files(self.dir):
            if relative == MANIFEST:
                continue
            info = check_regular_file(self.dir, relative)
            seen = (info.st_ino, info.st_size, info.st_mtime_ns)
            if seen not in self._hashed:
                self._hashed[seen] = FileEntry(sha256=sha256_of(self.dir / relative), size=info.st_size)
            entries[relative] = self._hashed[seen]
        return entries

    def _put_in_place(self) -> None:
        self._check_free()
        try:
            if self.out.is_dir() and any(self.out.iterdir()):
                os.rename(self.out, self._replaced)
            os.rename(self.dir, self.out)
        except BaseException:
            self._restore_replaced()
            raise
        _fsync(self.out.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)

    def _restore_replaced(self) -> None:
        if self._replaced.is_dir() and not os.path.lexists(self.out):
            os.rename(self._replaced, self.out)

    def _check_free(self) -> None:
        if not os.path.lexists(self.out):
            return
        if self.out.is_symlink() or not self.out.is_dir():
            raise BundleNotWritten(f"{self.out} exists and is not a folder; choose another name")
        if not any(self.out.iterdir()):
            return
        if not (self.out / MANIFEST).is_file():
            raise BundleNotWritten(f"{self.out} exists, is not empty and is not a bundle; choose another folder")
        if not self.overwrite:
            raise BundleNotWritten(f"{self.out} already holds a bundle; pass --overwrite to replace it")

    def _remove_leftovers(self) -> None:
        """Needs the lock. A build killed between the two renames of an overwrite leaves the old bundle set aside."""
        self._restore_replaced()
        if self._replaced.is_dir():
            shutil.rmtree(self._replaced)
        prefix = f".{self.out.name}.partial-"
        for entry in self.out.parent.iterdir():
            if entry.name.startswith(prefix) and entry.name[len(prefix) :].isdigit():
                shutil.rmtree(entry)

    def _release(self) -> None:
        # Unlinked while held: filelock gives up a lock whose file has no name left, so no two builds can hold it.
        with contextlib.suppress(PermissionError):  # Windows does not remove open files
            self._lock_path.unlink(missing_ok=True)
        self._lock.release()
        if not self._committed:
            self._remove_made_parents()

    def _make_parents(self) -> None:
        missing = [folder for folder in self.out.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made_parents.insert(0, folder)

    def _remove_made_parents(self) -> None:
        for folder in self._made_parents:
            with contextlib.suppress(OSError):  # not empty: someone else uses it by now
                folder.rmdir()

    def _explain(self, error: OSError) -> BundleNotWritten:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        return BundleNotWritten(f"cannot write the bundle {self.out}: {reason}")

    def _write_failure(self, error: BaseException) -> OSError | None:
        """The failed write behind ``error``; native libraries wrap it into other types and keep only the text."""
        seen: BaseException | None = error
        while seen is not None:
            if isinstance(seen, OSError) and (seen.errno in _FULL or self._concerns(seen.filename)):
                return seen
            for code in _FULL:
                if f"os error {code}" in str(seen) or os.strerror(code) in str(seen):
                    return OSError(code, os.strerror(code))
            seen = seen.__cause__ or seen.__context__
        return None

    def _concerns(self, filename: object) -> bool:
        return isinstance(filename, str | os.PathLike) and Path(filename).is_relative_to(self.dir)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if isinstance(attribute.value, ir.ExternalTensor):
                    yield attribute.value


def _check_external_data(root: Path, graph_file: str, data_files: set[str]) -> None:
    """DamagedBundle unless every external tensor of the graph lies within one of the graph's own data files."""
    folder = os.path.dirname(graph_file)
    for tensor in _external_tensors(ir.load(root / graph_file)):
        path = f"{folder}/{tensor.location}" if folder else str(tensor.location)
        if path not in data_files:
            raise DamagedBundle(
                f"tensor {tensor.name!r} of {graph_file} keeps its data in {str(tensor.location)!r}, "
                f"which is not one of its data files ({', '.join(sorted(data_files)) or 'it has none'})"
            )
        end = (tensor.offset or 0) + (tensor.length or 0)
        if end > check_regular_file(root, path).st_size:
            raise DamagedBundle(f"tensor {tensor.name!r} of {graph_file} ends at byte {end}, past the end of {path}")
