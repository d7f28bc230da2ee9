"""How many threads run an operator when nobody says."""

from __future__ import annotations

import os

import pytest

from dspark_runtime.processors import allowed_processors, default_threads, physical_cores


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("5,2", 5), (" 4 ", 4), ("99999", 1024)])
def test_the_environment_decides(value: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert default_threads() == threads


@pytest.mark.parametrize("value", ["", "0", "-1", "many", "2.5"])
def test_what_is_no_number_of_threads_counts_for_nothing(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert default_threads() == physical_cores()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_process_kept_to_one_processor_has_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    allowed = allowed_processors()
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert default_threads() == physical_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
