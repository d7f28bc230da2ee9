"""Which tests run in one worker: those that share what is slow to make, such as a bundle or a traced architecture."""

from __future__ import annotations

import gc
import itertools
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.shared.folders import remove_unused

SHARING = ("real_model", "validate", "drafting", "engines", "plugins", "cli", "serve", "deploy", "runtime")
"""Folders whose files share such things. They come first, the slowest of them before the others, for an even end."""
BY_ARCHITECTURE = ("parity", "passes", "kernels")

QUICK = ("runtime", "docs", "shared", "test_project.py", "test_rooms.py")
"""What ``--quick`` runs: unit tests that trace and build nothing."""
TRACED = {"tiny", "tiny_windowed", "bundle"}
"""Fixtures of those folders that trace or build."""

# Tests run the same whether or not the sequence kernels were compiled; those of the kernels ask for them.
os.environ.setdefault("DSPARK_CPU_LIBRARY", "none")


def group(nodeid: str) -> str:
    """Name of the tests that run in the worker of this one: a folder, an architecture or a file."""
    file, folder = nodeid.partition("::")[0], folder_of(nodeid)
    if folder in SHARING:
        return folder
    return _architecture(nodeid) or file


def folder_of(nodeid: str) -> str:
    """The folder of ``tests/`` that a test is in."""
    return nodeid.partition("::")[0].removeprefix("tests/").partition("/")[0]


def _architecture(nodeid: str) -> str:
    """The architecture that a test is given; empty if it is not one of those that are grouped by them."""
    if folder_of(nodeid) not in BY_ARCHITECTURE:
        return ""
    # torch, transformers: only where there are such tests
    from tests.tiny_models import ARCHITECTURES, MORE_ARCHITECTURES

    arguments = re.split(r"[\[\]-]", nodeid.partition("[")[2])
    return next((arch for arch in (*ARCHITECTURES, *MORE_ARCHITECTURES) if arch in arguments), "")


def _place(nodeid: str) -> int:
    """When a test runs: long groups first and those of one architecture last, the shortest, so that the end is even."""
    name = group(nodeid)
    if name in SHARING:
        return SHARING.index(name)
    if not _architecture(nodeid):
        return 100
    from tests.tiny_models import ARCHITECTURES

    return 200 if name in ARCHITECTURES else 300


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="run only unit tests that trace and build nothing")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the folders and files that are not :data:`QUICK`; None lets pytest decide."""
    if not config.getoption("quick"):
        return None
    inside = collection_path.relative_to(Path(__file__).parent).parts
    return True if inside and inside[0] not in QUICK else None


def _is_quick(item: pytest.Item) -> bool:
    """Whether ``--quick`` runs a test: it traces no graph, nor asks for a fixture that does by the name it is given."""
    given = getattr(getattr(item, "callspec", None), "params", {}).values()
    asked = {*getattr(item, "fixturenames", ()), *(value for value in given if isinstance(value, str))}
    return not (TRACED & asked or "test_traces" in item.nodeid)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("quick"):
        left = [item for item in items if not _is_quick(item)]
        items[:] = [item for item in items if _is_quick(item)]
        config.hook.pytest_deselected(items=left)
    items.sort(key=lambda item: _place(item.nodeid))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What collection imported lives as long as the process, so the garbage collector need not look at it again."""
    _share_traces()
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    _share_traces()


def _share_traces() -> None:
    """Equal traces are made once, see ``shared/traces.py``; as soon as there is torch, which quick tests do without."""
    if "torch" in sys.modules:
        from tests.shared import traces

        traces.share()


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # the process that starts the workers, or the only one
        remove_unused()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """With ``--durations``, what each folder took, and each worker, which should end together."""
    if terminalreporter.config.getoption("durations") is None:
        return
    folders, workers = Counter[str](), Counter[str]()
    for report in itertools.chain(*terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            folders[folder_of(report.nodeid)] += report.duration
            workers[getattr(report, "worker_id", "one process")] += report.duration
    terminalreporter.section("seconds by folder and by worker")
    for seconds in (folders, workers):
        terminalreporter.write_line(", ".join(f"{name} {total:.0f}" for name, total in seconds.most_common()))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadscope``, scopes are the groups; xdist 3.8's own ``loadgroup`` does nothing under pytest 9.2."""
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0] if config.getoption("quick") else group(nodeid)

    return ByGroup(config, log)
