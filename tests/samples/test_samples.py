"""The samples run as their first lines say, on a tiny bundle, and do what they claim."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared.bundles import built_llama

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "samples"
API_SAMPLES = ("python_api/generate.py", "batch/batch.py", "custom_drafter/bigrams.py")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with random weights and room for a conversation."""
    return built_llama(tmp_path_factory.mktemp("samples"), "none", max_position_embeddings=1024)


def run(sample: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SAMPLES / sample), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("sample", API_SAMPLES)
def test_a_sample_runs(sample: str, bundle: Path) -> None:
    done = run(sample, str(bundle))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_python_api_sample_shows_equal_texts(bundle: Path) -> None:
    assert "same as plain: True" in run("python_api/generate.py", str(bundle)).stdout


def test_the_batch_answers_every_prompt(bundle: Path) -> None:
    output = run("batch/batch.py", str(bundle)).stdout
    assert len(re.findall(r"^> ", output, re.MULTILINE)) == 4
    assert len(re.findall(r"^\[(?:length|eos), \d+ tokens\]$", output, re.MULTILINE)) == 4
    assert re.search(r"together \d+\.\d tokens/s", output)


def test_the_custom_drafter_drafts_and_changes_nothing(bundle: Path) -> None:
    last = run("custom_drafter/bigrams.py", str(bundle)).stdout.splitlines()[-1]
    accepted = re.fullmatch(r"(\d+\.\d+) tokens a round; same tokens: True", last)
    assert accepted and float(accepted[1]) >= 1.0


def test_the_quickstart_compares_on_a_bundle_that_is_there(bundle: Path) -> None:
    arguments = ["--bundle", str(bundle), "--max-new-tokens", "24", "--threads", "1"]
    done = run("quickstart/quickstart.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") >= 3 and "DIFFERENT" not in done.stdout


def test_every_sample_is_listed_with_its_command() -> None:
    text = (SAMPLES / "README.md").read_text(encoding="utf-8")
    folders = {path.name for path in SAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(re.findall(r"^\| \[(\w+)\]", text, re.MULTILINE))
    for sample in API_SAMPLES:
        assert f"python samples/{sample} BUNDLE" in text
        assert f"python samples/{sample} BUNDLE" in (SAMPLES / sample).read_text(encoding="utf-8")


def test_run_script_is_valid_bash() -> None:
    for script in (SAMPLES / "quickstart" / "run.sh", ROOT / "scripts" / "environment.sh"):
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert os.access(SAMPLES / "quickstart" / "run.sh", os.X_OK)


def test_the_server_answers_and_stops(bundle: Path) -> None:
    done = run("serve/serve.py", str(bundle), "--once", "--max-new-tokens", "12", "--question", "one two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("> one two\n")
    assert re.search(r"^\[\d+ tokens in \d+\.\d\d s; drafts accepted: \d+, rejected: \d+\]$", done.stdout, re.MULTILINE)
