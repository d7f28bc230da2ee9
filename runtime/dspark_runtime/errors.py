"""Every error this project raises on purpose: one type per kind of cause, each with the exit code of the command line.

A message says what was asked, what exists and what to do next. Nothing else is raised for bad input; anything that
escapes as another type is a bug of this project (exit code 70).
"""

from __future__ import annotations


class DsparkError(Exception):
    """Base of all deliberate errors. ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class UsageError(DsparkError):
    """The request itself is wrong: an option, a prompt or a sampling parameter outside its range."""

    exit_code = 2


class CheckpointError(DsparkError):
    """The model to build from cannot be used: missing, damaged or inconsistent files."""

    exit_code = 3


class ModelNotFound(CheckpointError):
    """No such hub id, revision or local folder, or it needs a login, or the machine is offline."""


class InvalidConfig(CheckpointError):
    """config.json is unreadable, or its values contradict each other."""


class InvalidWeights(CheckpointError):
    """A weight file is damaged, incomplete, outside its folder or does not fit the config."""


class InvalidTokenizer(CheckpointError):
    """The tokenizer is missing, damaged or does not fit the model's vocabulary."""


class UntrustedCheckpoint(CheckpointError):
    """Using the checkpoint would run code that came with it, and the trust gate is closed."""

    exit_code = 4


class UnsupportedArchitecture(CheckpointError):
    """The architecture is not one that can be traced; the message gives the reason."""

    exit_code = 5


class ExportError(DsparkError):
    """Tracing, rewriting or quantizing a graph failed."""

    exit_code = 6


class BundleError(DsparkError):
    """A bundle cannot be opened or written."""

    exit_code = 7


class DamagedBundle(BundleError):
    """A file of the bundle is missing, altered or outside the bundle."""


class IncompatibleBundle(BundleError):
    """The manifest has unknown keys, a newer schema or a graph this runtime cannot run."""


class BackendError(DsparkError):
    """An inference backend is not installed, cannot load a graph, or failed while running."""

    exit_code = 8


class CapacityError(UsageError):
    """The request does not fit the model's positions or the cache."""


class InvalidTree(UsageError):
    """A token tree breaks its invariants (order, parents, depth, duplicate siblings, size)."""


class ServiceError(DsparkError):
    """A service could not finish a request. Derived types say why."""

    exit_code = 8


class Overloaded(ServiceError):
    """The queue is full; try again later."""


class DeadlineExceeded(ServiceError):
    """The time the sender gave has passed, in the queue or while the text was made."""


class ServiceStopped(ServiceError):
    """The service is draining or closed and takes no requests, or it was closed before the text ended."""


class ServiceUnhealthy(ServiceError):
    """The service's engine failed twice in a row, or its thread ended; it takes no more requests."""


class ChatTemplateError(UsageError):
    """The chat template is missing, malformed, or exceeded its sandbox limits."""


class BundleBusy(BundleError):
    """Another build is writing into the same folder."""


class BundleNotWritten(BundleError):
    """The bundle could not be written: the folder is taken or read-only, the disk is full, a limit was reached."""


class DeploymentError(DsparkError):
    """A deployment cannot be written: the folder is taken, or it or the disk does not take it."""

    exit_code = 7


class InvalidVocabMap(CheckpointError):
    """The map from a draft's own tokens to the target's is missing, incomplete or contradicts itself."""


class DraftMismatch(CheckpointError):
    """A draft does not fit the model it should draft for, in more ways than one. Derived types name a single way."""

    exit_code = 9


class TokenizerMismatch(DraftMismatch):
    """Draft and model split text differently or number their tokens differently."""


class VocabularyMismatch(DraftMismatch):
    """Draft and model have vocabularies of sizes that padding does not explain."""


class HiddenSizeMismatch(DraftMismatch):
    """The draft reads features of another width than the model's."""


class TapsMismatch(DraftMismatch):
    """The draft reads layers the model does not have, or was made for a model of another depth."""


class BlockSizeMismatch(DraftMismatch):
    """More tokens per round are requested than the draft was trained to draft."""


class MaskTokenMismatch(DraftMismatch):
    """The draft's mask token is not a row of the model's embedding, or one of the model's ordinary tokens."""


class RopeMismatch(DraftMismatch):
    """Draft and model rotate positions differently."""


class EmbeddingsMismatch(DraftMismatch):
    """The draft's copies of the model's embedding or head differ from the model's own."""


class EngineBuildError(ExportError):
    """A graph could not be compiled to an engine; the message names node and tensor as far as the compiler tells."""


class UnsupportedNode(EngineBuildError):
    """The compiler does not take an operator of the graph, or not with these inputs."""


class EnginePrecisionError(EngineBuildError):
    """The compiler has no fused attention for the element type of the bundle."""


class AttentionNotFused(EngineBuildError):
    """The compiler has no fused kernel for an attention, or an engine came out without one."""


class CacheNotInPlace(EngineBuildError):
    """An engine came out in which a cache output is not the memory of its input."""


class ProfileMismatch(EngineBuildError):
    """A compiled engine has other shape ranges than those requested."""


class CompilerCrashed(EngineBuildError):
    """The compiler's process ended without an answer."""


class CompilerMissing(BackendError):
    """The compiler of the wanted flavour is not installed."""


class PlanDamaged(DamagedBundle):
    """An engine's plan is not the file the manifest describes. Derived types say how it differs."""


class PlanEmpty(PlanDamaged):
    """The plan has no bytes."""


class PlanTruncated(PlanDamaged):
    """The plan is shorter than the manifest says."""


class PlanExtended(PlanDamaged):
    """The plan is longer than the manifest says."""


class PlanAltered(PlanDamaged):
    """The plan has the right length and another digest."""


class PlanSwapped(PlanDamaged):
    """The plan is that of another engine of the bundle."""


class EngineRefused(BackendError):
    """An undamaged engine cannot be used here. Derived types say why."""


class EngineOutdated(EngineRefused):
    """The engine was compiled from another graph than the bundle's."""


class EngineVersionMismatch(EngineRefused):
    """The engine needs another version of TensorRT than the installed one."""


class EngineDeviceMismatch(EngineRefused):
    """The engine was compiled for other GPUs than this one."""


class EngineWithoutDevice(EngineRefused):
    """There is no usable GPU: no device, no driver, or one that is too old."""


class EnginePluginMismatch(EngineRefused):
    """The engine needs plugins of another version than this runtime or its library has."""


class EngineRangeExceeded(EngineRefused):
    """A pass is larger than the shape ranges the engine was compiled for."""
