"""Makes a drafter from a target and prompts: responses, features, training, calibration, and their description.

All slow results are kept in a work folder as they arrive, so that the same command resumes where a killed one stopped.
The drafter's folder appears at the end, complete.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import filelock
import torch

from dspark_export.checkpoints import resolve
from dspark_export.checkpoints.trust import Trust
from dspark_export.prompts.answers import Response
from dspark_export.prompts.packed import PackedResponses
from dspark_export.train.asking import Plan, origin_of, read_prompts, write_prompts, write_responses
from dspark_export.train.bundle_features import BundleTarget
from dspark_export.train.calibration import Calibration, calibrated
from dspark_export.train.card import CardFacts, TrainedDrafter, record, write_card
from dspark_export.train.curves import draw_curves
from dspark_export.train.evaluate import Evaluation, tree_lengths
from dspark_export.train.features import FeatureStore, TappedTarget, fill
from dspark_export.train.module import DraftGeometry, TrainableDrafter
from dspark_export.train.options import TREE, FeatureReader, TrainOptions
from dspark_export.train.processes import Processes
from dspark_export.train.responses import read_responses, split
from dspark_export.train.saving import load_drafter_like, save_drafter
from dspark_export.train.targets import embedding_and_head, frequent_tokens, geometry_for
from dspark_export.train.trainer import StepReport, Trainer
from dspark_runtime import Bundle
from dspark_runtime.errors import BundleBusy, BundleNotWritten, UsageError

if TYPE_CHECKING:
    from dspark_export.checkpoints import Checkpoint
    from dspark_runtime.bundle.manifest import Source

_Result = TypeVar("_Result")

OnProgress = Callable[[str, int, int, str], None]
"""Called with a stage (``prompts``, ``responses``, ``features``, ``training``), how much is done, of what, a remark."""

_FEATURES, _HELD_OUT, _TRAINING, _RESPONSES, _LOCK = "features", "held_out", "training", "responses.packed", ".lock"
_MADE_FOR = "made_for.json"


@dataclass(frozen=True)
class DrafterJob:
    """What to train, and from what.

    ``model`` is a hub id, folder or GGUF file. ``out``: the drafter's new folder; ``work``: what is kept between runs.
    ``prompts`` are files. ``bundle``, one of the same model or what gives its path, answers them into ``answers``
    (None: a file in ``work``). ``responses`` are files of token ids that were made before; then nothing is generated.
    ``features``: read by the model in float32, or by the bundle in its precision. ``init``: a drafter of the same shape
    to begin with, whose vocabulary is kept; None for random weights.
    ``held_out``: greedy responses that are kept for evaluation and calibration. ``card``: more for the model card.
    """

    model: str
    out: Path
    work: Path
    options: TrainOptions = field(default_factory=TrainOptions)
    generation: Plan = field(default_factory=lambda: Plan(count=2000))
    prompts: tuple[Path, ...] = ()
    bundle: Path | Callable[[], Path] | None = None
    answers: Path | None = None
    responses: tuple[Path, ...] = ()
    features: FeatureReader = "model"
    init: Path | None = None
    held_out: int = 64
    revision: str | None = None
    device: str = "cpu"
    threads: int | None = None
    card: CardFacts = field(default_factory=CardFacts)
    overwrite: bool = False
    trust: Trust = field(default_factory=Trust.closed)

    def __post_init__(self) -> None:
        if self.held_out < 4:
            raise UsageError(f"--held-out {self.held_out}: give at least 4 responses to judge the drafter by")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads}: give at least 1")

    @property
    def answers_file(self) -> Path:
        """``answers``, or where they are by default."""
        return self.answers or self.work / _RESPONSES


@dataclass(frozen=True)
class WrittenAnswers:
    """``responses`` in the file ``path``, of which ``written`` are new, with ``tokens`` tokens in ``seconds``."""

    path: Path
    responses: int
    written: int
    tokens: int
    seconds: float


def train_drafter(job: DrafterJob, on_progress: OnProgress = lambda *_: None) -> TrainedDrafter | None:
    """Train a drafter as ``job`` says; of several processes that ``torchrun`` started, all but the first return None.

    Raises:
        UsageError: no prompts, options that do not fit the model or the work folder, no such device.
        CheckpointError: the target cannot be used.
        BundleBusy, BundleNotWritten: another run has the work folder, or the drafter cannot be written.
    """
    processes = Processes.joined(_device(job.device))
    try:
        return _train(job, processes, on_progress if processes.first else lambda *_: None)
    finally:
        processes.close()


def write_answers(job: DrafterJob, on_progress: OnProgress = lambda *_: None) -> WrittenAnswers:
    """Write the responses of a job and train nothing. Raises what :func:`train_drafter` raises."""
    checkpoint = resolve(job.model, job.revision, job.trust)
    bundle = _open_writer(job, checkpoint.source())
    before = list(PackedResponses(job.answers_file)) if job.answers_file.exists() else []
    began = time.perf_counter()
    _answer(job, bundle, on_progress)
    seconds = time.perf_counter() - began
    file = PackedResponses(job.answers_file)
    new = list(file)[len(before) :]
    return WrittenAnswers(file.path, len(file), len(new), sum(len(item.response) for item in new), seconds)


def _train(job: DrafterJob, processes: Processes, on_progress: OnProgress) -> TrainedDrafter | None:
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    _check_out(job)
    checkpoint = resolve(job.model, job.revision, job.trust)
    geometry = geometry_for(checkpoint, job.options.shape)
    try:
        job.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BundleNotWritten(f"cannot make the work folder {job.work}: {error.strerror or error}") from error
    lock = filelock.FileLock(job.work / _LOCK, timeout=0)
    try:
        if processes.first:
            lock.acquire()
    except filelock.Timeout as error:
        raise BundleBusy(f"another training works in {job.work}; wait until it ends, or name another --work") from error
    try:
        return _Run(job, checkpoint, geometry, processes, on_progress).finish()
    finally:
        lock.release()


class _Run:
    def __init__(
        self,
        job: DrafterJob,
        checkpoint: Checkpoint,
        geometry: DraftGeometry,
        processes: Processes,
        on_progress: OnProgress,
    ) -> None:
        self._job, self._checkpoint, self._geometry, self._processes = job, checkpoint, geometry, processes
        self._on_progress = on_progress
        self._seconds: dict[str, float] = {}
        self._opened: Bundle | None = None
        self._source = checkpoint.source()
        if processes.first:
            self._require_same_target()
        self._model = checkpoint.load_model(torch.float32).to(processes.device)

    def finish(self) -> TrainedDrafter | None:
        """Every stage. What slow ones make, the first process writes and the others read."""
        learn, judge = self._shared("responses", self._make_responses, self._read_responses)
        samples, held_out = self._shared("features", lambda: self._features(learn, judge), self._stores)
        trainer = self._trainer(samples, held_out, learn)
        self._timed("training", lambda: self._train(trainer))
        trained = self._judge_and_write(trainer, learn, judge) if self._processes.first else None
        self._processes.wait()
        return trained

    def _shared(self, stage: str, make: Callable[[], _Result], read: Callable[[], _Result]) -> _Result:
        """What the first process makes; the others read it when it is done."""
        if self._processes.first:
            result = self._timed(stage, make)
            self._processes.wait()
            return result
        self._processes.wait()
        return read()

    def _judge_and_write(
        self, trainer: Trainer, learn: Sequence[Response], judge: Sequence[Response]
    ) -> TrainedDrafter:
        found = trainer.evaluate()
        with trainer.averaged():
            trees = tree_lengths(trainer.model, trainer.held_out, torch.float32, (TREE,))
        calibration, checked = calibrated(found)
        length_before = float(trainer.log[0]["accepted_length"])
        trained = TrainedDrafter(
            out=self._job.out,
            accepted_length=found.accepted_length,
            untrained_length=length_before,
            tree_length=trees[TREE],
            survival=found.survival,
            calibration_error=(checked.before, checked.after),
            parameters=sum(p.numel() for p in trainer.model.parameters()),
            steps=trainer.step,
            seconds={**self._seconds, "training": sum(line["seconds"] for line in trainer.log)},
        )
        self._write(trainer, found, calibration, checked, trained, (learn, judge))
        return trained

    def _timed(self, stage: str, work: Callable[[], _Result]) -> _Result:
        began = time.perf_counter()
        result = work()
        self._seconds[stage] = time.perf_counter() - began
        return result

    # Stages --------------------------------------------------------------------------------------------------------

    def _require_same_target(self) -> None:
        """Features in the work folder must be those of this target, these taps and these lengths."""
        options = self._job.options
        ours = {
            "model": self._checkpoint.id,
            "files": self._source.files,
            "taps": list(self._geometry.taps),
            "max_length": options.max_length,
            "target_top": options.target_top,
            "held_out": self._job.held_out,
            "features": self._job.features,
            "init": None if self._job.init is None else str(self._job.init),
        }
        path = self._job.work / _MADE_FOR
        if path.exists():
            theirs = json.loads(path.read_text("utf-8"))
            if changed := [key for key in ours if ours[key] != theirs.get(key)]:
                raise UsageError(
                    f"{self._job.work} was begun with other settings ({', '.join(changed)} differ): use those, or name "
                    "another --work"
                )
        else:
            path.write_text(json.dumps(ours, indent=2) + "\n", "utf-8")

    def _make_responses(self) -> tuple[list[Response], list[Response]]:
        if not self._job.responses:
            _answer(self._job, self._bundle(), self._on_progress)
        return self._read_responses()

    def _read_responses(self) -> tuple[list[Response], list[Response]]:
        """Those to learn from and those to judge by."""
        job, vocab = self._job, self._checkpoint.vocab_size
        items = list(
            dict.fromkeys(item for path in job.responses or (job.answers_file,) for item in read_responses(path))
        )
        if wrong := [t for item in items for t in (*item.prompt, *item.response) if not 0 <= t < vocab]:
            raise UsageError(f"--responses: token {wrong[0]} is outside the vocabulary of {vocab}")
        learn, judge = split(items, job.held_out)
        if not learn or len(judge) < 4:
            raise UsageError(
                f"{len(items)} responses leave {len(judge)} greedy ones to judge the drafter by, and 4 are needed: "
                "make more (--count), some of them at temperature 0"
            )
        return learn, judge

    def _bundle(self) -> Bundle:
        """The bundle that writes and, where asked, reads."""
        self._opened = self._opened or _open_writer(self._job, self._source)
        return self._opened

    def _features(self, learn: Sequence[Response], judge: Sequence[Response]) -> tuple[FeatureStore, FeatureStore]:
        options, work = self._job.options, self._job.work
        stores = self._stores(grow=True)
        target = self._reader()
        whole = len(learn) + len(judge)
        for store, items, before in ((stores[1], judge, 0), (stores[0], learn, len(judge))):
            if len(store) > len(items) or not store.begins(item.span(options.max_length)[0] for item in items):
                raise UsageError(f"{work} has features of other responses than these; name another --work")
            fill(
                store,
                target,
                items,
                options.max_length,
                options.target_top,
                functools.partial(self._feature_progress, before, whole),
            )
        if isinstance(target, TappedTarget):
            target.release()
        return stores

    def _reader(self) -> TappedTarget | BundleTarget:
        taps = self._geometry.taps
        return BundleTarget(self._bundle(), taps) if self._job.features == "bundle" else TappedTarget(self._model, taps)

    def _feature_progress(self, before: int, whole: int, done: int) -> None:
        self._on_progress("features", before + done, whole, "")

    def _stores(self, grow: bool = False) -> tuple[FeatureStore, FeatureStore]:
        width, top = len(self._geometry.taps) * self._geometry.hidden, self._job.options.target_top
        names = (_FEATURES, _HELD_OUT)
        learn, judge = (FeatureStore(self._job.work / name, width, top, read_only=not grow) for name in names)
        return learn, judge

    def _trainer(self, samples: FeatureStore, held_out: FeatureStore, learn: Sequence[Response]) -> Trainer:
        options, ends = self._job.options, self._checkpoint.eos_token_ids
        embedding, head = embedding_and_head(self._model)
        g = self._geometry
        ids = frequent_tokens(learn, options.shape.draft_vocab, g.vocab, g.mask_token, ends)
        torch.manual_seed(options.seed)
        if self._job.init is None:
            model = TrainableDrafter(self._geometry, embedding.cpu(), head.cpu(), ids)
        else:
            model = load_drafter_like(self._job.init, self._geometry, embedding.cpu(), head.cpu())
        model = model.to(self._processes.device)
        judged = [held_out[i] for i in range(len(held_out))]
        return Trainer(model, samples, judged, options, self._job.work / _TRAINING, self._processes)

    def _train(self, trainer: Trainer) -> None:
        whole = self._job.options.steps
        last = ""

        def shown(report: StepReport) -> None:
            nonlocal last
            if report.accepted_length is not None:
                last = f", accepted length {report.accepted_length:.2f}"
            self._on_progress("training", report.step, whole, f"loss {report.loss:.3f}{last}")

        trainer.run(on_step=shown)

    # Output --------------------------------------------------------------------------------------------------------

    def _write(
        self,
        trainer: Trainer,
        found: Evaluation,
        calibration: Calibration,
        checked: Calibration,
        trained: TrainedDrafter,
        responses: tuple[Sequence[Response], Sequence[Response]],
    ) -> None:
        job = self._job
        out = Path(os.path.abspath(job.out))
        partial = out.parent / f".{out.name}.partial-{os.getpid()}"
        depth = int(self._checkpoint.config.get_text_config().num_hidden_layers)
        facts: dict[str, Any] = {
            "confidence_temperatures": list(calibration.temperatures),
            "rounds": found.rounds,
            "error_before": checked.before,
            "error_after": checked.after,
        }
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            with trainer.averaged():
                save_drafter(
                    partial,
                    trainer.model,
                    target_layers=depth,
                    calibration=facts if found.rounds else None,
                    confidence_shift=calibration.shift,
                )
            self._checkpoint.save_tokenizer(partial)  # for the pair check: token ids mean nothing without it
            (partial / "training.json").write_text(record(job.options, trained, trainer.log, responses), "utf-8")
            draw_curves(trainer.log, partial / "curves.png")
            write_card(
                partial / "README.md", self._checkpoint, self._geometry, job.options, trained, responses, job.card
            )
            if out.exists():
                shutil.rmtree(out)
            partial.replace(out)
        except OSError as error:
            raise BundleNotWritten(f"cannot write the drafter to {out}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _open_writer(job: DrafterJob, source: Source) -> Bundle:
    """The job's bundle, which was built from the files of ``source``, the model's."""
    if job.bundle is None:
        raise UsageError("no responses and nothing to make them with: give --bundle, or --responses of token ids")
    path = job.bundle() if callable(job.bundle) else job.bundle
    bundle = Bundle.open(path, threads=job.threads)
    if bundle.manifest.source.files != source.files:
        raise UsageError(f"--bundle {path} was built from other files than {job.model}: build it from the same model")
    _ = bundle.codec  # which says what to do where there is no tokenizer
    return bundle


def _answer(job: DrafterJob, bundle: Bundle, on_progress: OnProgress) -> None:
    """Bring the file of responses to what the job asks for."""
    plan, texts = job.generation, read_prompts(job.prompts)  # what is wrong with a file of prompts is said first
    with PackedResponses(job.answers_file, origin_of(bundle, plan)) as file:
        write_prompts(bundle, file, plan, lambda done: on_progress("prompts", done, plan.synthesise, ""))
        write_responses(bundle, texts, file, plan, lambda done: on_progress("responses", done, plan.count, ""))


def _check_out(job: DrafterJob) -> None:
    out = job.out
    if not out.exists():
        return
    ours = out.is_dir() and (not any(out.iterdir()) or (out / "training.json").is_file())
    if not ours:
        raise BundleNotWritten(f"{out} exists and is not a drafter trained by this program; name a new folder")
    if not job.overwrite and any(out.iterdir()):
        raise BundleNotWritten(f"{out} exists; pass --overwrite to replace the drafter in it, or name a new folder")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name} is unknown; use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: PyTorch sees no CUDA device here; use cpu")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name} is not supported; use cpu or cuda")
    return device
