"""The training loop: sampled anchors, Muon or AdamW with warm-up and cosine, an average of the weights, exact resume.

Everything random follows from (seed, step), so a resumed training needs only the step and continues as if it had never
stopped. Of the batch that follows from them, each of several processes computes its share, so the losses are those of
one process with the whole batch. State is kept in safetensors files; nothing is pickled.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dspark_export.train.evaluate import Evaluation, evaluate
from dspark_export.train.features import Batch, FeatureStore, Sample, collate
from dspark_export.train.losses import Slots, Terms, terms
from dspark_export.train.module import TrainableDrafter
from dspark_export.train.optimizer import DrafterOptimizer
from dspark_export.train.options import TrainOptions
from dspark_export.train.processes import Processes
from dspark_runtime.errors import UsageError

_STATE, _LOG = "state.json", "log.jsonl"
_FILES = ("weights", "average", "first", "second")


@dataclass(frozen=True)
class StepReport:
    """One line of the log. Loss terms are means over slots; ``agreement`` is the mean chance of a slot to be accepted
    with all before it given. ``accepted_length`` appears only in the lines of evaluations."""

    step: int
    loss: float
    ce: float
    distance: float
    confidence: float
    agreement: float
    rate: float
    seconds: float
    accepted_length: float | None = None
    survival: tuple[float, ...] | None = None


class Trainer:
    """Trains ``model`` on ``samples``; keeps its state in ``folder`` and goes on from there.

    ``options.batch`` samples in each of ``processes`` (None: this one alone) are one batch. A training may go on with
    another number of processes if their batches have as many samples together.

    Raises:
        UsageError: the folder holds the state of a training with other options, or no sample is long enough.
    """

    def __init__(
        self,
        model: TrainableDrafter,
        samples: FeatureStore,
        held_out: list[Sample],
        options: TrainOptions,
        folder: Path,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes(torch.device("cpu"))
        self.model, self.samples, self.held_out, self.options, self.folder = model, samples, held_out, options, folder
        self._dtype = getattr(torch, options.dtype)
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._optimizer = DrafterOptimizer(self._parameters, options)
        self._average = {n: p.detach().clone() for n, p in self._parameters.items()}
        spans = {i: _spans(samples[i]) for i in range(len(samples))}
        self._spans = {i: span for i, span in spans.items() if span}
        self._usable = list(self._spans)
        if len(self._usable) < self.processes.count:
            raise UsageError(
                f"{len(self._usable)} responses are long enough to learn from, and each of {self.processes.count} "
                "processes needs one; make more or longer ones"
            )
        losses = _Losses(model, options, self._dtype)
        self._losses: _Losses | DistributedDataParallel = losses
        if self.processes.count > 1:
            self._losses = DistributedDataParallel(losses, broadcast_buffers=False)  # they never change
        self.step = 0
        self.log: list[dict[str, Any]] = []
        self._resume()

    # Steps ---------------------------------------------------------------------------------------------------------

    def run(self, until: int | None = None, on_step: Callable[[StepReport], None] = lambda _: None) -> None:
        """Train up to step ``until`` (None: all of them); state is saved at every evaluation and at the end.

        The log begins with what the untrained drafter is worth, as step 0.
        """
        goal = self.options.steps if until is None else min(until, self.options.steps)
        if not self.log:
            self.log.append({"step": 0, "seconds": 0.0, **self._judged()})
        while self.step < goal:
            report = self._one()
            if self.step % self.options.evaluate_every == 0 or self.step == self.options.steps:
                report = StepReport(**{**vars(report), **self._judged()})
                self._write(report)
                self.save()
            else:
                self._write(report)
            on_step(report)
        self.save()

    def _one(self) -> StepReport:
        began = time.perf_counter()
        options = self.options
        rate = learning_rate(options, self.step)
        self._optimizer.zero_grad()
        sums = np.zeros(5)
        for part in range(options.accumulate):
            random = np.random.default_rng((options.seed, self.step, part))
            batch, anchors = self._draw(random)
            with self._sharing(part + 1 == options.accumulate):
                found: Terms = self._losses(batch, anchors)
                weight = self.processes.total(found.weight).clamp_min(1e-6)
                loss = (
                    options.ce * found.ce + options.tv * found.distance + options.confidence * found.confidence
                ) / weight
                # Gradients are averaged over the processes, and the loss is the sum of what each of them has.
                (loss * self.processes.count / options.accumulate).backward()  # type: ignore[no-untyped-call]
            values = (loss, *(v / weight for v in (found.ce, found.distance, found.confidence, found.agreement)))
            sums += self.processes.total(torch.stack([value.detach().float() for value in values])).cpu().numpy()
        torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), options.clip or math.inf)
        self._optimizer.step(rate)
        self.step += 1
        keep = min(options.ema, (1 + self.step) / (10 + self.step)) if options.ema else 0.0
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self._average[name].lerp_(parameter.detach(), 1 - keep)
        sums /= options.accumulate
        loss_, ce, distance, confidence, agreement = (float(value) for value in sums)
        took = time.perf_counter() - began
        return StepReport(self.step, loss_, ce, distance, confidence, agreement, rate, took)

    def _sharing(self, last: bool) -> AbstractContextManager[None]:
        """Where gradients are added up over the processes only in the ``last`` pass of a step."""
        if isinstance(self._losses, DistributedDataParallel) and not last:
            return self._losses.no_sync()
        return nullcontext()

    def _draw(self, random: np.random.Generator) -> tuple[Batch, Tensor]:
        """This process's share of a batch. What comes from ``random`` is the same in all of them."""
        options, count = self.options, self.processes.count
        share = min(options.batch, len(self._usable) // count)
        chosen = random.choice(self._usable, share * count, replace=False)
        mine = range(self.processes.rank * share, (self.processes.rank + 1) * share)
        samples = []
        anchors = np.zeros((share, options.anchors), np.int64)  # 0: no block; a block needs a row before it
        for place, number in enumerate(chosen):
            low, high = self._spans[int(number)]
            blocks = min(options.anchors, high - low)
            found = np.sort(random.choice(np.arange(low, high), blocks, replace=False))
            if place in mine:
                anchors[place - mine.start, :blocks] = found
                samples.append(self.samples[int(number)])
        device = self.model.fc.weight.device
        return collate(samples, self._dtype, device), torch.from_numpy(anchors).to(device)

    # Evaluation ----------------------------------------------------------------------------------------------------

    def evaluate(self) -> Evaluation:
        """Accepted length of the averaged weights on the held-out samples."""
        with self.averaged():
            return evaluate(self.model, self.held_out, torch.float32)

    def _judged(self) -> dict[str, Any]:
        """What the first process finds; the others have no use for it."""
        if not self.processes.first:
            return {}
        found = self.evaluate()
        return {"accepted_length": found.accepted_length, "survival": found.survival}

    def averaged(self) -> _Swapped:
        """A context in which the model has the averaged weights."""
        return _Swapped(self._parameters, self._average)

    # State ---------------------------------------------------------------------------------------------------------

    def _write(self, report: StepReport) -> None:
        line = {key: value for key, value in vars(report).items() if value is not None}
        self.log.append(line)

    def save(self) -> None:
        """Write weights, average, moments, log and step; the step last, so that a kill leaves the state before.

        Of several processes the first one does.
        """
        if not self.processes.first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tag = f"{self.step:08d}"
        contents = {
            "weights": {n: p.detach() for n, p in self._parameters.items()},
            "average": self._average,
            "first": self._optimizer.first(),
            "second": self._optimizer.second(),
        }
        for name, tensors in contents.items():
            save_file({n: t.contiguous() for n, t in tensors.items()}, self.folder / f"{name}.{tag}.safetensors")
        state = {"step": self.step, "options": self._fingerprint(), "log": self.log}
        partial = self.folder / f".{_STATE}.partial"
        with partial.open("w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.folder / _STATE)
        for path in self.folder.glob("*.safetensors"):
            if f".{tag}." not in path.name:
                path.unlink()

    def _fingerprint(self) -> dict[str, Any]:
        options = self.options.fingerprint()
        return options | {"batch": options["batch"] * self.processes.count}

    def _resume(self) -> None:
        path = self.folder / _STATE
        if not path.exists():
            return
        state = json.loads(path.read_text("utf-8"))
        ours, theirs = json.loads(json.dumps(self._fingerprint())), state["options"]
        changed = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        if changed:
            raise UsageError(
                f"{self.folder} holds a training with other options ({', '.join(changed)} differ): continue with those "
                "it began with, or name another folder"
            )
        tag = f"{state['step']:08d}"
        stored = {name: load_file(self.folder / f"{name}.{tag}.safetensors") for name in _FILES}
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(stored["weights"][name])
                self._average[name].copy_(stored["average"][name])
        self._optimizer.load(int(state["step"]), stored["first"], stored["second"])
        self.step, self.log = int(state["step"]), list(state["log"])


class _Losses(nn.Module):
    """The terms of the loss of a batch, as one call: what several processes share is the gradient of that."""

    def __init__(self, model: TrainableDrafter, options: TrainOptions, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self._options, self._mixed = options, dtype == torch.bfloat16

    def forward(self, batch: Batch, anchors: Tensor) -> Terms:
        """``anchors`` [batch, anchors]: positions of blocks, 0 for none."""
        safe = anchors.clamp_min(1)
        with torch.autocast(anchors.device.type, torch.bfloat16, enabled=self._mixed):
            hidden = self.model(batch.features, batch.ids, safe)
            return terms(self.model, hidden, self._slots(batch, anchors, safe), self._options.chunk)

    def _slots(self, batch: Batch, anchors: Tensor, safe: Tensor) -> Slots:
        block, length = self.model.geometry.block, batch.ids.shape[1]
        offsets = torch.arange(block, device=anchors.device)
        rows = safe[..., None] + offsets  # row p says what follows position p
        inside = (rows + 1 < batch.lengths[:, None, None]) & (anchors > 0)[..., None]
        rows = rows.clamp_max(length - 1)

        def at(source: Tensor, places: Tensor) -> Tensor:
            flat = places.flatten(1)
            index = flat if source.dim() == 2 else flat[..., None].expand(-1, -1, source.shape[2])
            found = source.gather(1, index)
            return found.view(*places.shape, *source.shape[2:])

        labels = at(batch.ids, (rows + 1).clamp_max(length - 1))
        weights = inside.cumprod(-1) * torch.exp(-offsets / self._options.decay)
        return Slots(labels, at(batch.ids, rows), weights, at(batch.top_ids, rows), at(batch.top_probs, rows))


class _Swapped:
    def __init__(self, parameters: dict[str, torch.nn.Parameter], values: dict[str, Tensor]) -> None:
        self._parameters, self._values = parameters, values
        self._kept: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        for name, parameter in self._parameters.items():
            self._kept[name] = parameter.data
            parameter.data = self._values[name]

    def __exit__(self, *_: object) -> None:
        for name, parameter in self._parameters.items():
            parameter.data = self._kept[name]


def learning_rate(options: TrainOptions, step: int) -> float:
    """Rate of the step with this number, from 0: linear warm-up, then a cosine to 0."""
    warm = max(1, round(options.warmup * options.steps))
    if step < warm:
        return options.peak_rate * (step + 1) / warm
    done = (step - warm) / max(1, options.steps - warm)
    return options.peak_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _spans(sample: Sample) -> tuple[int, int] | None:
    """Positions a block may start at, from the response's first token to the last but one; None if there are none."""
    low, high = max(1, sample.start), len(sample.ids) - 1
    return (low, high) if high > low else None
