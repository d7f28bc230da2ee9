"""A whole validation: which checks run on what, in which order, and the report of all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dspark_export.build.manifest import own_version
from dspark_export.checkpoints import resolve
from dspark_export.graphs.decoder import trace_without_weights
from dspark_export.passes.packed_weights import load_plain
from dspark_export.prompts.sets import SHIPPED, load_sets
from dspark_export.prompts.texts import PLAIN, encode
from dspark_export.validate import acceptance, draft_acceptance, lossless, sampling, speed
from dspark_export.validate import drafts as trained
from dspark_export.validate.checks import Check, Family, Report
from dspark_export.validate.engines import check_engines, engines_of
from dspark_export.validate.extent import EXTENTS
from dspark_export.validate.inventory import check_inventory
from dspark_export.validate.llama_cpp import check_llama_cpp
from dspark_export.validate.numerics import GraphCheck, check_quantization
from dspark_export.validate.options import ValidateOptions
from dspark_export.validate.phrases import check_store
from dspark_export.validate.quantized import put_into
from dspark_export.validate.rebuild import Rebuilt
from dspark_export.validate.robustness import check_robustness
from dspark_export.validate.weights import check_weights
from dspark_runtime import Bundle, Generation
from dspark_runtime.bundle.manifest import DrafterEntry, Source
from dspark_runtime.errors import BackendError, DsparkError, ModelNotFound, UsageError
from dspark_runtime.processors import default_threads, this_machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dspark_export.checkpoints import Checkpoint

OnStep = Callable[[str, int, int], None]
"""What begins, how many steps are done, of how many."""


class Step(NamedTuple):
    """A part of a validation; its checks run as they are read, and may need what earlier steps left."""

    name: str
    checks: Callable[[], Iterable[Check]]


def validate(options: ValidateOptions, on_step: OnStep = lambda *_: None) -> Report:
    """Run every check; a check that breaks is a failed one.

    Raises:
        BundleError: the bundle cannot be opened.
        CheckpointError: the model is not there, damaged, or another one than the bundle's.
        UsageError: options that do not fit the bundle.
        EngineRefused: engines that cannot run here.
    """
    return _Validation(options, on_step).run()


class _Validation:
    def __init__(self, options: ValidateOptions, on_step: OnStep) -> None:
        self.options, self.extent = options, EXTENTS[options.level]
        self._on_step = on_step
        self._began = time.perf_counter()
        self.threads = options.threads or default_threads()
        self.bundle = Bundle.open(options.bundle, threads=options.threads, exact=options.exact)
        self.files = self.bundle.files
        self.engines = (
            engines_of(self.files, options.against) if options.against in ("tensorrt", "tensorrt-rtx") else []
        )
        self.ids = self._prompts()
        self.modes = [mode for mode in self.bundle.speculation_modes() if mode != PLAIN]
        self.checkpoint = self._find_model()
        self.model: PreTrainedModel | None = None
        self.rebuilt: Rebuilt | None = None
        self.references: dict[str, trained.Reference] = {}
        self.keep = options.keep or Path(f"{self.files.root}.validation")
        self.texts = lossless.Texts(self.ids, {})
        self.steps = (
            Step("model", self._load),
            Step("plain", self._plain),
            Step("numerics", self._numerics),
            Step("drafters", self._drafters),
            Step("robustness", self._robustness),
            Step("losslessness", self._losslessness),
            Step("plumbing", self._plumbing),
            Step("speed", self._speed),
        )

    def run(self) -> Report:
        checks: list[Check] = []
        try:
            for number, step in enumerate(self.steps):
                self._on_step(step.name, number, len(self.steps))
                for check in step.checks():
                    checks.append(check)
                    self._on_step(f"{step.name}: {check.id}", number, len(self.steps))
        finally:
            if self.rebuilt is not None:
                self.rebuilt.close()
        self._on_step("done", len(self.steps), len(self.steps))
        return self._report(checks)

    # Inputs --------------------------------------------------------------------------------------------------------

    def _prompts(self) -> list[list[int]]:
        room = self.bundle.limits.positions - self.extent.new - 64
        if f"{'tokenizer'}/tokenizer.json" not in self.files.manifest.files:
            random = np.random.default_rng(0)
            vocab = self.bundle.limits.vocab_size
            return [random.integers(0, vocab, min(20 + 7 * n, room)).tolist() for n in range(4)]
        items = load_sets(
            list(self.options.prompts or SHIPPED), self.extent.prompts if not self.options.prompts else None
        )
        return [encode(self.bundle, item.text)[:room] for item in items]

    def _forced(self) -> list[list[int]]:
        """Texts of different lengths: prompts with what the model said to them."""
        found = []
        for number, (prompt, generation) in enumerate(zip(self.ids, self.texts.alone[PLAIN], strict=True)):
            whole = [*prompt, *generation.tokens]
            while len(whole) < 24:  # a text that ended at once
                whole = whole + whole
            found.append(whole[: self.extent.tokens - 9 * (number % 4)])
        return found

    def _find_model(self) -> Checkpoint | None:
        source = self.files.manifest.source
        name = self.options.model or (source.id if source.kind == "hub" else None)
        if self.options.against not in (None, "torch"):
            name = self.options.model
        if self.options.against == "llama.cpp" and (source.kind != "gguf" or name is None):
            raise UsageError(
                f"--against llama.cpp compares with the GGUF file a bundle was built from; this one is of the "
                f"{source.kind} checkpoint {source.id}"
                + ("; give the file with --model" if source.kind == "gguf" else ": use --against torch")
            )
        if name is None:
            if self.options.against == "torch":
                raise UsageError(
                    f"--against torch needs the model, and the manifest only says that it was the {source.kind} "
                    f"checkpoint {source.id}; give its place with --model"
                )
            return None
        revision = self.options.revision or (source.revision if self.options.model is None else None)
        try:
            checkpoint = resolve(name, revision, self.options.trust, trial=trace_without_weights)
        except ModelNotFound:
            if self.options.model is not None or self.options.against == "torch":
                raise
            return None
        other = missing_weights(source, checkpoint.source())
        if other:
            raise UsageError(
                f"--model {name} is not the checkpoint the bundle was built from: it has no file with the "
                f"digest of {other[0]} ({source.kind} {source.id}); give that one, or build the bundle again"
            )
        return checkpoint

    # Steps ---------------------------------------------------------------------------------------------------------

    def _load(self) -> Iterator[Check]:
        if self.checkpoint is None:
            yield Check(
                id="numerics.pytorch",
                family="numerics",
                title="Comparison with PyTorch",
                status="skipped",
                message="The checkpoint is not known; give it with --model to compare graphs and weights with it.",
            )
            return
        import torch

        dtype = getattr(torch, self.files.graph("target").dtype)
        self.model = self.checkpoint.load_model(dtype)
        self.rebuilt = Rebuilt(self.files, self.model, self.checkpoint)
        yield from self._guarded("numerics.weights", "numerics", partial(check_weights, self.files, self.rebuilt))
        if (source := self.checkpoint.gguf_file or self.checkpoint.directory) is not None:
            yield from self._guarded("numerics.inventory", "numerics", partial(check_inventory, self.files, source))
        torch.nn.Module.float(self.model)  # transformers' own refuses models from GGUF files

    def _plain(self) -> Iterator[Check]:
        self.texts.alone[PLAIN] = self._generate(PLAIN)
        yield from self._guarded(
            "losslessness.plain", "losslessness", partial(lossless.check_plain, self.bundle, self.model, self.texts)
        )

    def _numerics(self) -> Iterator[Check]:
        texts = self._forced()[: self.extent.texts]
        if self.options.against == "llama.cpp":
            assert self.model is not None and self.checkpoint is not None and self.checkpoint.gguf is not None
            check = partial(check_llama_cpp, self.checkpoint.gguf, self.model, texts, self.threads)
            yield from self._guarded("numerics.llama.cpp", "numerics", check)
        if self.model is not None and self.files.manifest.precision.quantized:
            standard = self.files.path(self.files.graph("target").file)
            yield from self._guarded(
                "numerics.quantization",
                "numerics",
                partial(check_quantization, self.files, self.model, texts, self.options.threads),
            )
            # From here on PyTorch has the weights the bundle holds.
            if unknown := put_into(self.model, load_plain(standard)):
                raise BackendError(f"the model has no weight {unknown[0]}, which the bundle quantizes")
        checker = GraphCheck(self.files, texts, self.options.threads, self.model, self.rebuilt, self.keep)
        yield from self._guarded("numerics", "numerics", checker.run)
        if self.engines:
            yield from self._guarded(
                "numerics.engines",
                "numerics",
                partial(check_engines, self.files, self.engines, texts, self.options.threads, self.keep),
            )

    def _drafters(self) -> Iterator[Check]:
        entries = [entry for entry in self.files.manifest.drafters if entry.trained]
        if self.options.drafts:
            if self.checkpoint is None or self.model is None:
                raise UsageError("--draft: drafters are compared with PyTorch together with their model; give --model")
            self.references = trained.references(self.bundle, self.checkpoint, self.model, self.options.drafts)
        prompts, tokens = self.ids[:2], self.extent.new
        for entry in entries:
            reference = self.references.get(entry.name)
            if reference is None:
                yield Check(
                    id=f"numerics.{entry.name}",
                    family="numerics",
                    title=f"{entry.name} against PyTorch",
                    status="skipped",
                    message="Give the checkpoint of the drafter with --draft, and the model with --model.",
                )
            elif reference.model is not None:
                one = GraphCheck(self.files, self._forced()[:1], self.options.threads, reference.model, None, self.keep)
                yield from self._guarded(
                    f"numerics.{entry.name}",
                    "numerics",
                    partial(trained.check_draft_model, self.bundle, reference, one),
                )
            else:
                yield from self._guarded(
                    f"numerics.{entry.name}",
                    "numerics",
                    partial(trained.check_drafter, self.bundle, reference, prompts, tokens),
                )

    def _robustness(self) -> Iterator[Check]:
        texts = [text[: max(24, len(text) - 5 * i)] for i, text in enumerate(self._forced()[:3])]
        if len(texts) == 1:
            texts.append(texts[0][: max(16, len(texts[0]) - 7)])
        yield from self._guarded(
            "robustness", "robustness", partial(check_robustness, self.bundle, texts, self.options.level)
        )

    def _losslessness(self) -> Iterator[Check]:
        for mode in self.modes:
            yield from self._guarded(f"losslessness.{mode}", "losslessness", partial(self._one_mode, mode))
        texts = self._forced()
        yield from self._guarded(
            "losslessness.rules", "losslessness", partial(sampling.check_rules, self.bundle, texts[:3])
        )
        yield from self._guarded(
            "losslessness.rejection", "losslessness", partial(sampling.check_rejection, self.bundle, texts)
        )
        sampled = self.modes if self.options.level == "full" else self.modes[:1]
        few = self.ids if self.options.level == "full" else self.ids[:2]
        for mode in sampled:
            yield from self._guarded(
                f"losslessness.sampled.{mode}",
                "losslessness",
                partial(sampling.check_sampled, self.bundle, few, mode, self.extent.new),
            )
        yield from self._guarded(
            "losslessness.noise", "losslessness", partial(lossless.check_noise, self.bundle, max(texts, key=len))
        )
        if self.extent.batch:
            yield from self._guarded("losslessness.batch", "losslessness", self._batches)

    def _one_mode(self, mode: str) -> Check:
        began = time.perf_counter()
        self.texts.alone[mode] = self._generate(mode)
        return lossless.check_mode(self.bundle, self.texts, mode, began)

    def _batches(self) -> Iterator[Check]:
        for mode in self.modes:
            began = time.perf_counter()
            size = self.extent.batch
            runs = self.bundle.with_fresh_schedule()
            plain, mine = (
                lossless.Texts(
                    self.ids, {m: runs.generate(self.ids, speculate=m, max_new_tokens=self.extent.new, batch_size=size)}
                )
                for m in (PLAIN, mode)
            )
            both = lossless.Texts(self.ids, {**plain.alone, **mine.alone})
            found = lossless.check_mode(self.bundle, both, mode, began)
            where = found.where and f"batch of {size}, {found.where}"
            yield found.model_copy(
                update={
                    "id": f"losslessness.batch.{mode}",
                    "title": f"{found.title} in a batch of {size}",
                    "where": where,
                }
            )

    def _plumbing(self) -> Iterator[Check]:
        floors = {**_recorded_floors(self.files.manifest.validation, self.options), **self.options.floors}
        for mode in self.modes:
            if mode in self.texts.alone and acceptance.fixed_length(self.bundle, mode) is not None:
                yield acceptance.check_floor(mode, self.texts, floors)
        few, new = self.ids[:3], min(self.extent.new, 48)
        yield from self._guarded("plumbing.store", "plumbing", partial(self._store, few, new))
        for entry in self.files.manifest.drafters:
            yield from self._trained(entry)

    def _store(self, prompts: list[list[int]], tokens: int) -> Iterator[Check]:
        yield check_store(self.bundle, prompts, tokens)

    def _trained(self, entry: DrafterEntry) -> Iterator[Check]:
        """What a trained drafter is fed, how often it is accepted, and when its confidences decide."""
        model, reference, new = self.model, self.references.get(entry.name), self.extent.new
        if model is not None and reference is not None and reference.modules:
            yield from self._guarded(
                f"plumbing.features.{entry.name}",
                "plumbing",
                partial(draft_acceptance.check_features, self.bundle, reference, model, self.ids[:2], new),
            )
        if entry.block is None:
            return
        if model is not None and reference is not None:
            yield from self._guarded(
                f"plumbing.reference.{entry.name}",
                "plumbing",
                partial(draft_acceptance.check_acceptance, self.bundle, reference, model, self.ids, new),
            )
        if entry.block.confidence:
            yield from self._guarded(
                f"plumbing.confidences.{entry.name}",
                "plumbing",
                partial(draft_acceptance.check_confidences, self.bundle, entry, self.ids[:2], new),
            )

    def _speed(self) -> Iterator[Check]:
        check, costs = speed.check_costs(self.bundle, self.threads)
        yield check
        for mode in self.modes:
            if mode in self.texts.alone:
                yield speed.check_mode(mode, self.texts, costs)

    # Help ----------------------------------------------------------------------------------------------------------

    def _generate(self, mode: str) -> list[Generation]:
        """Texts of a mode; drafts have a fixed length where accepted lengths are compared with other builds."""
        runs = self.bundle.with_fresh_schedule()
        length = acceptance.fixed_length(self.bundle, mode)
        named: dict[str, Any] = {} if length is None else {"draft_length": length, "draft_branches": 1}
        return [runs.generate(ids, speculate=mode, max_new_tokens=self.extent.new, **named) for ids in self.ids]

    def _guarded(self, name: str, family: Family, check: Callable[[], Check | Iterable[Check]]) -> Iterator[Check]:
        """What ``check`` returns, one or several; an error of the runtime in the middle of one is its failure."""
        began = time.perf_counter()
        try:
            found = check()
            yield from [found] if isinstance(found, Check) else found
        except UsageError:
            raise
        except (DsparkError, ValueError, IndexError, KeyError, RuntimeError) as error:
            yield Check(
                id=name,
                family=family,
                title=f"{name} could be checked",
                status="failed",
                where=type(error).__name__,
                message=f"The check broke: {error}",
                seconds=time.perf_counter() - began,
            )

    def _report(self, checks: Sequence[Check]) -> Report:
        manifest, machine = self.files.manifest, this_machine()
        lengths = {
            mode: length
            for mode, length in acceptance.accepted_lengths(self.bundle, self.texts).items()
            if acceptance.fixed_length(self.bundle, mode) is not None
        }
        return Report(
            created_by=own_version(),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            bundle=self.files.root.name,
            bundle_digest=bundle_digest(manifest.files),
            model=manifest.source.id,
            precision=manifest.precision.weights,
            exact=self.bundle.exact,
            level=self.options.level,
            against=self.options.against or ("torch" if self.checkpoint is not None else "onnxruntime"),
            machine=f"{machine.cpu}, {self.threads} threads",
            prompts=len(self.ids),
            seconds=round(time.perf_counter() - self._began, 1),
            passed=all(check.status != "failed" for check in checks),
            acceptance=lengths,
            checks=tuple(checks),
        )


_WEIGHTS = (".safetensors", ".gguf", ".bin")


def _recorded_floors(validation: Mapping[str, Any], options: ValidateOptions) -> dict[str, float]:
    """Accepted lengths of an earlier validation at the same level; those of other prompts say nothing."""
    if options.prompts or validation.get("level") != options.level:
        return {}
    floors = validation.get(acceptance.FLOORS)
    return {str(k): float(v) for k, v in floors.items()} if isinstance(floors, dict) else {}


def bundle_digest(files: Mapping[str, Any]) -> str:
    """One digest over all files of a bundle but its reports."""
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(files):
        if not name.startswith("validation/"):
            digest.update(f"{name} {files[name].sha256}\n".encode())
    return digest.hexdigest()


def missing_weights(built_from: Source, found: Source) -> list[str]:
    """Weight files of a bundle's checkpoint that another one lacks; what files are called does not matter."""
    there = set(found.files.values())
    return [name for name, digest in built_from.files.items() if name.endswith(_WEIGHTS) and digest not in there]
