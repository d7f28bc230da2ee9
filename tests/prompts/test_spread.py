"""Answers of several copies of a bundle: without Ray, in shards of one process, and with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from dspark_export.prompts.answers import answer
from dspark_export.prompts.packed import PackedResponses
from dspark_export.prompts.spread import Copy, ShardWriter
from dspark_export.train.asking import Plan, origin_of, write_responses
from dspark_runtime import Bundle, SamplingParams
from dspark_runtime.errors import UsageError
from tests.shared.bundles import built_llama
from tests.shared.folders import CACHE

ROOT = Path(__file__).resolve().parents[2]
WITH_RAY = """
import json, sys
from dspark_export.prompts.spread import Copy, answer_with_actors
copy, prompts, temperatures = json.loads(sys.stdin.read())
answers = answer_with_actors(Copy(**copy), prompts, temperatures, actors=2)
print(json.dumps([(item.prompt, item.response, item.temperature) for item in answers]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_llama(tmp_path_factory.mktemp("spread"))


def asked() -> tuple[list[list[int]], list[float]]:
    prompts = [[number + 3, 7, number + 9] for number in range(20)]
    return prompts, [0.8 * (number % 2) for number in range(20)]


def expected(folder: Path) -> list[list[object]]:
    prompts, temperatures = asked()
    params = [SamplingParams(temperature=value) for value in temperatures]
    given = answer(Bundle.open(folder, threads=1), prompts, params, max_new_tokens=9, seed=4, rows=3)
    return [[list(item.prompt), list(item.response), item.temperature] for item in given]


def copy_of(folder: Path) -> Copy:
    return Copy(str(folder), 1, 2, 9, 4)


def test_a_shard_has_the_answers_of_one_process(folder: Path) -> None:
    """In whatever shards the prompts go out."""
    pairs = list(zip(*asked(), strict=True))
    writer = ShardWriter(asdict(copy_of(folder)))
    found = [json.loads(writer({"shard": json.dumps(shard)})["shard"]) for shard in (pairs[13:], pairs[:13])]
    assert found[1] + found[0] == expected(folder)


def test_without_ray_the_message_says_what_to_install(folder: Path, tmp_path: Path) -> None:
    bundle, plan = Bundle.open(folder, threads=1), Plan(3, actors=2)
    with (
        PackedResponses(tmp_path / "r.packed", origin_of(bundle, plan)) as file,
        pytest.raises(UsageError, match="ray\\[data\\]"),
    ):
        write_responses(bundle, ["why not", "what for", "where to"], file, plan)


@pytest.mark.slow
def test_actors_of_ray_give_the_answers_of_one_process(folder: Path) -> None:
    """With the real Ray Data, in an environment of its own."""
    environment = CACHE.parent / "ray"
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    needs = ("ray[data]", "filelock", "onnxruntime", "jinja2", "pydantic", "tokenizers", "llguidance")
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", *needs], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"Ray cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "runtime")))
    given = json.dumps([asdict(copy_of(folder)), *asked()])
    environ = os.environ | {"PYTHONPATH": paths, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    run = subprocess.run(
        [python, "-c", WITH_RAY], input=given, capture_output=True, text=True, env=environ, timeout=900
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert sorted(map(str, found)) == sorted(map(str, expected(folder)))
