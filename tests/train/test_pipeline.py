"""From prompts to a drafter in a bundle, with a tiny target: the whole command, and what a kill leaves behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from benchmarks import drafter_sweep
from dspark_export.checkpoints import resolve
from dspark_export.drafts.pair_check import PairWarning
from dspark_export.prompts.answers import Response
from dspark_export.prompts.packed import PackedResponses
from dspark_export.train.asking import Plan, origin_of, read_prompts, write_prompts, write_responses
from dspark_export.train.bundle_features import BundleTarget
from dspark_export.train.features import TappedTarget
from dspark_export.train.options import DrafterShape, TrainOptions
from dspark_export.train.pipeline import DrafterJob, train_drafter
from dspark_export.train.responses import read_responses, split
from dspark_runtime import Bundle
from dspark_runtime.errors import BundleNotWritten, UsageError
from tests import tiny_models
from tests.cli.conftest import Invoke, invoke  # noqa: F401  (a fixture)
from tests.shared.bundles import built_llama

WORDS = ("sum", "list", "river", "night", "code", "green", "walk", "seven", "paper", "why", "map", "stone", "cold")


SENTENCES = (
    "the river is as long as the road to the sea, and nobody has seen where it begins.",
    "a list is sorted when no number in it is smaller than the number before.",
    "walk to the green door, knock seven times, and wait until somebody opens it.",
    "the sum of two even numbers is even, and so is the sum of two odd numbers.",
    "at night the stones are cold, but the paper is dry and the map can be read.",
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learnt a few sentences: what one with random weights says, nothing could guess."""
    _, model = tiny_models.make("llama", num_hidden_layers=2)
    tokenizer = tiny_models.tokenizer()
    random = np.random.default_rng(0)
    texts = []
    for _ in range(600):
        asked = " ".join(random.choice(WORDS, 2))
        said = " ".join(random.choice(SENTENCES, 2))
        texts.append(torch.tensor(tokenizer.encode(f"<|user|>{asked}<|end|>\n<|assistant|>{said}<|end|>")))
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        chosen = random.choice(len(texts), 16, replace=False)
        ids = torch.nn.utils.rnn.pad_sequence([texts[i] for i in chosen], batch_first=True, padding_value=-100)
        loss = model(input_ids=ids.clamp_min(0), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.6
    folder = tmp_path_factory.mktemp("target") / "model"
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"{a} {b}" for a in WORDS for b in WORDS if a != b))
    return path


def command(target: Path, prompts: Path, out: Path, *more: object) -> tuple[object, ...]:
    made = ("--prompts", prompts, "--synthesise", 60, "--count", 180, "--max-new-tokens", 24, "--held-out", 6)
    trained = ("--steps", 60, "--batch", 8, "--anchors", 12, "--rate", 0.01, "--ema", 0.9, "--evaluate-every", 20)
    shape = ("--block", 3, "--rank", 16, "--max-length", 64)
    return ("train-drafter", target, "--out", out, *made, *trained, *shape, *more)


@pytest.fixture(scope="module")
def trained(target: Path, prompts: Path, invoke: Invoke, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("trained") / "drafter"
    found = invoke(
        *command(target, prompts, out, "--draft-vocab", 300, "--license", "apache-2.0", "--progress", "json")
    )
    assert found.exit_code == 0, found.output
    assert "accepted" in found.stdout and str(out) in found.stdout
    stages = [json.loads(line)["stage"] for line in found.stderr.splitlines() if line.startswith("{")]
    assert list(dict.fromkeys(stages)) == ["prompts", "responses", "features", "training"]
    return out


def test_it_learns(trained: Path) -> None:
    facts = json.loads((trained / "training.json").read_text())
    assert facts["steps"] == 60 and facts["responses"]["learn"]["count"] + facts["responses"]["judge"]["count"] <= 180
    assert facts["untrained_length"] < 1.2
    assert facts["accepted_length"] > facts["untrained_length"] + 0.8
    assert facts["evaluations"][0]["step"] == 0 and facts["evaluations"][-1]["step"] == 60
    card = (trained / "README.md").read_text()
    assert "license: apache-2.0" in card and "300 of 384 tokens" in card and f"{facts['accepted_length']:.2f}" in card
    assert (trained / "curves.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def built(target: Path, trained: Path, invoke: Invoke, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("built") / "bundle"
    with warnings.catch_warnings():
        warnings.simplefilter("error", PairWarning)  # the drafter comes with what the pair check asks for
        found = invoke(
            "build", "--phrases", 0, target, "--draft", trained, "--out", out, "--self-draft", "none", "--threads", 1
        )
    assert found.exit_code == 0, found.output
    return out


def test_the_bundle_drafts_as_well_as_training_said(trained: Path, built: Path) -> None:
    out, bundle = built, Bundle.open(built, threads=1)
    facts = next(entry.block for entry in bundle.manifest.drafters if entry.block)
    assert facts.confidence_temperatures is not None and len(facts.confidence_temperatures) == 3
    assert facts.vocab_map is not None and len(np.load(out / facts.vocab_map)) == 300  # none of them the mask
    work = trained.with_name("drafter.work")
    _, judge = split(read_responses(work / "responses.packed"), 6)
    texts = [list(item.prompt) for item in judge]
    plain = bundle.generate(texts, max_new_tokens=24, speculate="off")
    drafted = bundle.generate(texts, max_new_tokens=24, speculate="dspark", draft_length=3)
    assert [r.tokens for r in drafted] == [r.tokens for r in plain]
    length = float(np.mean([r.stats.accepted_length for r in drafted]))
    expected = json.loads((trained / "training.json").read_text())["accepted_length"]
    assert length > 1 + 0.8 * (expected - 1)


def test_the_sweep_of_sizes_counts_what_training_counted(
    target: Path,
    trained: Path,
    built: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Read back from its files, in bfloat16, the drafter is worth what it was in training; smaller ones less."""
    work = trained.with_name("drafter.work")
    sizes = ("--vocabularies", "40", "--blocks", "2", "--threads", "1", "--json")
    monkeypatch.setattr(sys, "argv", ["drafter_sweep.py", *map(str, (built, target, work, trained)), *sizes])
    assert drafter_sweep.main() == 0  # here, not in a process of its own: equal traces are shared
    rows = json.loads(capsys.readouterr().out)
    lengths = {(row["vocabulary"], row["block"]): row["accepted_length"] for row in rows}
    # A tree holds the whole main chain. Which size is best depends on measured times: one node more may gain nothing.
    assert all(row["tree_length"] >= row["accepted_length"] for row in rows if row["drafts"] > row["block"]), rows
    assert all(row["tree_length"] <= row["block"] + 1 for row in rows)
    assert set(lengths) == {(40, 2), (40, 3), (300, 2), (300, 3)}
    assert lengths[300, 3] == pytest.approx(
        json.loads((trained / "training.json").read_text())["accepted_length"], rel=0.03
    )
    assert lengths[300, 2] < lengths[300, 3] and lengths[40, 3] <= lengths[300, 3]


OPTIONS = TrainOptions(
    DrafterShape(block=3, rank=8), steps=12, batch=4, anchors=6, max_length=48, evaluate_every=4, rate=0.01
)


def job(
    target: Path, folder: Path, given: Path, optimizer: Literal["muon", "adamw"] = "muon", **changes: Any
) -> DrafterJob:
    settings: dict[str, Any] = {
        "model": str(target),
        "out": folder / "drafter",
        "work": folder / "work",
        "responses": (given,),
        "held_out": 4,
        "options": replace(OPTIONS, optimizer=optimizer),
    }
    return DrafterJob(**(settings | changes))


@pytest.fixture(scope="module")
def responses(trained: Path) -> Path:
    return trained.with_name("drafter.work") / "responses.packed"


class _Killed(Exception):
    pass


@pytest.mark.parametrize(
    "stage, at, optimizer",
    [
        ("features", 9, "muon"),
        ("training", 4, "muon"),
        ("training", 7, "muon"),
        ("training", 12, "muon"),
        ("training", 7, "adamw"),
    ],
)
def test_a_killed_training_goes_on_to_the_same_drafter(
    target: Path, responses: Path, tmp_path: Path, stage: str, at: int, optimizer: Literal["muon", "adamw"]
) -> None:
    """Stopped with no chance to tidy up, at a saved step or between two; curve and weights are the same, bit by bit."""
    one = job(target, tmp_path / "whole", responses, optimizer=optimizer)
    whole = train_drafter(one)

    def killed(now: str, done: int, whole: int, remark: str) -> None:
        if (now, done) == (stage, at):
            raise _Killed

    other = job(target, tmp_path / "parts", responses, optimizer=optimizer)
    with pytest.raises(_Killed):
        train_drafter(other, killed)
    assert not other.out.exists()
    again = train_drafter(other)
    assert again.accepted_length == whole.accepted_length and again.survival == whole.survival
    for name in ("model.safetensors", "config.json", "calibration.json"):
        assert (one.out / name).read_bytes() == (other.out / name).read_bytes()
    curves = [json.loads((j.work / "training" / "state.json").read_text())["log"] for j in (one, other)]
    for line in (*curves[0], *curves[1]):
        line.pop("seconds")
    assert curves[0] == curves[1] and len(curves[0]) == 13


def test_two_processes_train_like_one_with_the_whole_batch(target: Path, responses: Path, tmp_path: Path) -> None:
    """As torchrun starts them, with half of the batch each; one process can go on where they were."""
    one = job(target, tmp_path / "one", responses, options=replace(OPTIONS, batch=8))
    train_drafter(one)
    two = job(target, tmp_path / "two", responses)
    flags = {"batch": 4, "steps": 12, "anchors": 6, "max-length": 48, "evaluate-every": 4, "rate": 0.01, "rank": 8}
    options = [part for name, value in (flags | {"block": 3, "held-out": 4}).items() for part in (f"--{name}", value)]
    words = ["train-drafter", target, "--out", two.out, "--work", two.work, "--responses", responses, *options]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    done = subprocess.run([str(word) for word in (*launcher, "-m", "dspark_export", *words)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().count("trained ") == 1  # only the first one speaks
    curves = [json.loads((j.work / "training" / "state.json").read_text())["log"] for j in (one, two)]
    for ours, theirs in zip(*curves, strict=True):
        for name in ("loss", "ce", "distance", "confidence", "agreement"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-5), (ours, theirs)
        assert ours.get("accepted_length") == pytest.approx(theirs.get("accepted_length"), abs=0.02)
    before = (two.out / "model.safetensors").read_bytes()
    train_drafter(replace(two, options=replace(OPTIONS, batch=8), overwrite=True))
    assert (two.out / "model.safetensors").read_bytes() == before
    with pytest.raises(UsageError, match="batch"):
        train_drafter(replace(two, overwrite=True))


def test_training_goes_on_from_a_drafter(target: Path, responses: Path, tmp_path: Path) -> None:
    first = job(target, tmp_path / "first", responses)
    before = train_drafter(first)
    more = train_drafter(job(target, tmp_path / "more", responses, init=first.out))
    assert more.untrained_length == pytest.approx(before.accepted_length, abs=0.05)  # it was stored in bfloat16
    for changes, said in (
        ({"init": tmp_path / "nowhere"}, "nowhere"),
        ({"init": first.out, "options": TrainOptions(DrafterShape(block=2, rank=8), max_length=48)}, "block 3 instead"),
    ):
        with pytest.raises(UsageError, match=said):
            train_drafter(job(target, tmp_path / said.replace(" ", "_"), responses, **changes))


def test_a_bundle_reads_what_the_model_reads(target: Path, built: Path, responses: Path, tmp_path: Path) -> None:
    """In float32 the rows are the same, but for rounding; what a bundle's target does not return, it cannot read."""
    bundle = Bundle.open(built, threads=1)
    taps = bundle.engine("target").taps
    model = resolve(str(target)).load_model(torch.float32)
    by_model, by_bundle = TappedTarget(model, taps), BundleTarget(bundle, taps)
    items = list(read_responses(responses))[::25]
    long = [token for item in items for token in item.span(512)[0]][:300]  # more than one pass
    for ids, start in (*(item.span(64) for item in items), (long, 200)):
        one, other = by_model(ids, start, 8), by_bundle(ids, start, 8)
        torch.testing.assert_close(other.features.float(), one.features.float(), rtol=2e-2, atol=1e-2)  # bfloat16
        torch.testing.assert_close(other.top_probs, one.top_probs, rtol=5e-3, atol=1e-4)
        near = one.top_probs[:, 0] - one.top_probs[:, 1] < 1e-3
        assert bool((near | (one.top_ids[:, 0] == other.top_ids[:, 0])).all())
        assert not other.top_ids[:start].any() and other.top_probs[start:].any(1).all()
    by_model.release()
    with pytest.raises(UsageError, match="--features model"):
        BundleTarget(bundle, (-1, *taps))
    trained = train_drafter(job(target, tmp_path, responses, bundle=built, features="bundle"))
    assert trained is not None and trained.accepted_length > trained.untrained_length


@pytest.fixture(scope="module")
def writer(trained: Path) -> Path:
    """The bundle that the command built to write with."""
    return trained.with_name("drafter.work") / "writer.dspark"


@pytest.mark.parametrize("stage, at", [("prompts", 7), ("responses", 3), ("responses", 25)])
def test_killed_while_responses_are_written(writer: Path, prompts: Path, tmp_path: Path, stage: str, at: int) -> None:
    """With half a record at its end, the file goes on where it was; no prompt is answered twice."""
    bundle, plan = Bundle.open(writer, threads=1), Plan(30, max_new_tokens=8, rows=4, synthesise=10, seed=2)
    texts = read_prompts([prompts])

    def write(path: Path, killed: bool) -> PackedResponses:
        def kill(now: str, done: int) -> None:
            if killed and (now, done) == (stage, at):
                raise _Killed

        with PackedResponses(path, origin_of(bundle, plan)) as file:
            write_prompts(bundle, file, plan, lambda done: kill("prompts", done))
            write_responses(bundle, texts, file, plan, lambda done: kill("responses", done))
        return file

    whole, parts = tmp_path / "whole.packed", tmp_path / "parts.packed"
    expected = write(whole, killed=False)
    with pytest.raises(_Killed):
        write(parts, killed=True)
    with parts.open("ab") as file:
        file.write(b"\x01\xff\x00\x00\x00 half a record")
    found = write(parts, killed=False)
    # In w8a8 on ONNX Runtime a row's rounding depends on its batch, so texts may differ between the two files.
    assert [item.prompt for item in found] == [item.prompt for item in expected] and len(found) == 30
    assert found.own_prompts[:at] == expected.own_prompts[:at] and len(found.own_prompts) == 10
    assert len({item.prompt for item in found}) == 30
    assert list(PackedResponses(parts)) == list(found) and found.sources == expected.sources
    more = Plan(34, max_new_tokens=8, rows=4, synthesise=10, seed=2)
    with PackedResponses(parts, origin_of(bundle, more)) as file:
        write_responses(bundle, texts, file, more)
    assert list(PackedResponses(parts))[:30] == list(found) and len(file) == 34
    longer = Plan(34, max_new_tokens=9, rows=4, seed=2)
    with pytest.raises(UsageError, match="max_new_tokens"):
        PackedResponses(parts, origin_of(bundle, longer))


def test_answers_alone(target: Path, writer: Path, prompts: Path, tmp_path: Path, invoke: Invoke) -> None:  # noqa: F811
    kept = tmp_path / "kept.packed"
    words = ("train-drafter", target, "--out", tmp_path / "d", "--bundle", writer, "--answers", kept, "--answers-only")
    words = (*words, "--prompts", prompts, "--max-new-tokens", 6, "--threads", 1)
    first = invoke(*words, "--count", 12)
    assert first.exit_code == 0 and "wrote 12 responses" in first.stdout and "tokens/s" in first.stdout
    again = json.loads(invoke(*words, "--count", 15, "--json").stdout)
    assert (again["written"], again["responses"], again["path"]) == (3, 15, str(kept))
    assert not (tmp_path / "d").exists() and len(list(read_responses(kept))) == 15


def test_a_bundle_of_another_model_does_not_write(target: Path, prompts: Path, tmp_path: Path) -> None:
    other = built_llama(tmp_path / "other")
    wrong = job(target, tmp_path, other, responses=(), bundle=other, prompts=(prompts,))
    with pytest.raises(UsageError, match="other files"):
        train_drafter(wrong)


def test_one_prompt_is_on_one_side_only() -> None:
    items = [Response((n, n + 1), (5, 6), float(n % 2)) for n in range(2000)]
    learn, judge = split(items, 20)
    assert len(judge) == 20 and all(item.temperature == 0 for item in judge)
    assert not {item.prompt for item in learn} & {item.prompt for item in judge}
    more_learn, more_judge = split([*items, *(Response((n, 1), (7,), 0.0) for n in range(2000, 2500))], 20)
    assert more_judge == judge and more_learn[: len(learn)] == learn


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompts": ({"responses": (), "bundle": "writer"}, "--prompts"),
    "nothing to answer with": ({"responses": ()}, "--bundle"),
    "no such responses": ({"responses": (Path("nowhere.jsonl"),)}, "nowhere.jsonl"),
    "no cuda": ({"device": "cuda"}, "CUDA"),
    "no such device": ({"device": "gpu9"}, "gpu9"),
    "few held out": ({"held_out": 1}, "--held-out"),
    "taps too deep": ({"options": TrainOptions(DrafterShape(taps=(0, 9)))}, "--taps 9"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_say_what_to_do(case: str, target: Path, responses: Path, writer: Path, tmp_path: Path) -> None:
    if case == "no cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    changes, said = BAD[case]
    changes = changes | ({"bundle": writer} if "bundle" in changes else {})
    with pytest.raises(UsageError, match=said):
        train_drafter(job(target, tmp_path, responses, **changes))
    assert not (tmp_path / "drafter").exists()


def test_damaged_and_foreign_responses(target: Path, responses: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    for line, said in (
        ('{"prompt": [1], "response": "text"}', "bad.jsonl:1"),
        ("nothing", "bad.jsonl:1"),
        ('{"prompt": [1], "response": [99999, 3]}', "99999"),
        ('{"prompt": [1], "response": [2, 3], "temperature": 0}', "--count"),
    ):
        bad.write_text(line + "\n")
        with pytest.raises(UsageError, match=said):
            train_drafter(job(target, tmp_path, bad))
        assert bad.read_text() == line + "\n"  # what was given is not touched
        shutil.rmtree(tmp_path / "work")


def test_a_work_folder_belongs_to_one_target_and_training(target: Path, responses: Path, tmp_path: Path) -> None:
    first = job(target, tmp_path, responses)
    train_drafter(first)
    with pytest.raises(BundleNotWritten, match="--overwrite"):
        train_drafter(first)
    with pytest.raises(UsageError, match="taps"):
        changed = TrainOptions(DrafterShape(taps=(-1, 0)), max_length=48)
        train_drafter(job(target, tmp_path, responses, overwrite=True, options=changed))
    others = tmp_path / "others.jsonl"
    lines = [
        {"prompt": r.prompt, "response": r.response, "temperature": r.temperature} for r in read_responses(responses)
    ]
    others.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    with pytest.raises(UsageError, match="other responses"):
        train_drafter(job(target, tmp_path, others, overwrite=True))
    with pytest.raises(UsageError, match="rate"):
        slower = TrainOptions(**{**vars(first.options), "rate": 0.002})
        train_drafter(job(target, tmp_path, responses, overwrite=True, options=slower))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(BundleNotWritten, match="name a new folder"):
        train_drafter(job(target, tmp_path, responses, out=tmp_path / "mine", overwrite=True))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_the_plan_of_generation_is_checked() -> None:
    for wrong in ({"count": 0}, {"count": 5, "max_new_tokens": 0}, {"count": 5, "temperatures": (-1.0,)}):
        with pytest.raises(UsageError):
            Plan(**wrong)
