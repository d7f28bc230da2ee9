"""The Python API: open a bundle, generate text.

from dspark_runtime import Bundle

bundle = Bundle.open("smollm2.dspark")
print(bundle.generate("Once upon a time", max_new_tokens=64).text)
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, Unpack, overload

from dspark_runtime.arguments import Ids, Prompt, Text, TokenArray, by_name, plain_prompts, refuse_unknown, whole
from dspark_runtime.backends.exactness import accuracy_level, require_equal_batches
from dspark_runtime.backends.opening import Backend, open_backend
from dspark_runtime.backends.protocol import MOST_ROWS, ROUNDED_ACTIVATIONS, Engine, EngineOptions, GraphEngine
from dspark_runtime.bundle.files import TOKENIZER_DIR, BundleFiles
from dspark_runtime.bundle.manifest import Manifest
from dspark_runtime.decoding.loop import DecodingLoop, LoopOptions
from dspark_runtime.decoding.observer import Observer
from dspark_runtime.decoding.options import DEFAULTS, CallOptions, GenerateOptions, draft_options, sampling_params
from dspark_runtime.decoding.request import Limits, make_requests
from dspark_runtime.decoding.schedule import Schedule
from dspark_runtime.decoding.sequence import Generation
from dspark_runtime.decoding.stream import Stream
from dspark_runtime.drafters.base import Drafter
from dspark_runtime.drafters.choice import DrafterChoice
from dspark_runtime.drafters.parts import DraftOptions
from dspark_runtime.errors import UsageError
from dspark_runtime.phrases.store import PhraseOptions, PhraseStore, bundle_corpus
from dspark_runtime.serving.memory import check_memory
from dspark_runtime.serving.observer import ServiceObserver
from dspark_runtime.serving.options import DEFAULT_CAPACITY, ServiceOptions
from dspark_runtime.serving.service import Service
from dspark_runtime.speculation.costs import PassCosts
from dspark_runtime.speculation.sampling import SamplingParams
from dspark_runtime.text.chat_template import Message
from dspark_runtime.text.codec import TextCodec

Speculate = bool | str | Drafter | Sequence[Drafter] | None
"""False for ``off``, True and None for ``auto``; see :meth:`Bundle.generate`."""

Params = SamplingParams | Sequence[SamplingParams] | None
"""One setting for all prompts, or a sequence of one for each."""


class Bundle:
    """An opened bundle. It may generate any number of times; each call has a cache of its own."""

    def __init__(
        self,
        files: BundleFiles,
        options: EngineOptions,
        exact: bool,
        capacity: int | None,
        backend: Backend,
        phrases: PhraseOptions | None = None,
    ) -> None:
        self.files = files
        self.phrases = _phrase_store(files, phrases)
        self.exact = exact or backend.rows_are_equal
        self.engine_options = options
        self._backend = backend
        has_tokenizer = f"{TOKENIZER_DIR}/tokenizer.json" in files.manifest.files
        self._codec = TextCodec(files.tokenizer_dir) if has_tokenizer else None
        positions = min(self.manifest.model.max_positions, backend.limits.positions or 2**62)
        self.limits = Limits(self.manifest.model.vocab_size, min(positions, capacity or positions))
        # Elsewhere a row alone goes through other kernels than the same row among others, and products with rounded
        # activations turn the order of a sum into another token: see Schedule.
        noisy = exact and not backend.rows_are_equal
        self._min_rows = 2 if noisy else 1
        self._chains = noisy and options.accuracy_level == ROUNDED_ACTIVATIONS
        self.schedule = self._new_schedule()
        self._observer = Observer()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        exact: bool | None = None,
        capacity: int | None = None,
        spinning: bool = True,
        verify_digests: bool = True,
        backend: str = "onnxruntime",
        device: int = 0,
        phrases: PhraseOptions | None = None,
    ) -> Bundle:
        """Check the bundle at ``path``; its graphs are loaded when they are first needed.

        Args:
            threads: threads of one operator; None for ``OMP_NUM_THREADS``, otherwise one per physical core.
            exact: speculative text must equal plain text whatever the precision: no pass runs a single row alone,
                whose kernels round differently. None for the bundle's own setting.
            capacity: most tokens of prompt and text together; None for all positions of the model.
            spinning: worker threads wait busily, which is faster while nothing else wants the processor.
            verify_digests: compare every file with its digest first.
            backend: ``onnxruntime`` (the CPU), ``onnxruntime-cuda``, or ``tensorrt`` or ``tensorrt-rtx``, for which the
                bundle needs engines.
            device: number of the GPU.
            phrases: what is remembered of requests to draft from; None for the defaults. Nothing is written to disk
                without a file.

        Raises:
            BundleError: no bundle, or a damaged or incompatible one.
            UsageError: an unknown backend.
        """
        if not isinstance(path, str | os.PathLike):
            raise UsageError(f"a bundle is opened by the path of its folder, not {path!r:.40} ({type(path).__name__})")
        if capacity is not None:
            capacity = whole("capacity", capacity, 2, None, "None for all the model has, or a whole number")
        files = BundleFiles.open(path, verify_digests)
        precision = files.manifest.precision
        wanted = precision.exact if exact is None else exact
        options = EngineOptions(threads, spinning, accuracy_level(files, wanted))
        return cls(files, options, wanted, capacity, open_backend(files, backend, options, device, capacity), phrases)

    def with_fresh_schedule(self) -> Bundle:
        """The same bundle and loaded graphs with a schedule and phrases that have learned nothing yet (for
        measurements)."""
        other = copy.copy(self)
        other.phrases = self.phrases.fresh()
        other.schedule = other._new_schedule()
        return other

    def with_phrases(self, phrases: PhraseStore) -> Bundle:
        """The same bundle and loaded graphs, whose calls draft from ``phrases`` and add to them."""
        other = copy.copy(self)
        other.phrases = phrases
        return other

    def with_observer(self, observer: Observer) -> Bundle:
        """The same bundle and loaded graphs, whose calls tell ``observer`` what they do, round by round."""
        other = copy.copy(self)
        other._observer = observer
        return other

    def _new_schedule(self, costs: PassCosts | None = None, fixed: int | None = None) -> Schedule:
        rows = self._backend.limits.rows
        return Schedule(costs or self._costs(), fixed, self._min_rows, self._chains, rows)

    @property
    def rows_are_equal(self) -> bool:
        """Whether a row's bits depend on its own sequence alone, whatever a pass holds: see docs/exactness.md."""
        return self._backend.rows_are_equal

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.files.manifest

    @property
    def codec(self) -> TextCodec:
        """Tokenizer and chat template; UsageError if the bundle has no tokenizer."""
        if self._codec is None:
            raise UsageError(
                "this bundle has no tokenizer: it takes token ids and gives token ids; "
                "build it from a folder with tokenizer files to use text"
            )
        return self._codec

    @property
    def target(self) -> Engine:
        """The engine that runs one sequence at a time."""
        return self.engine("target")

    def engine(self, name: str, batched: bool = False) -> Engine:
        """The engine of graph ``name``, loaded on first use; ``batched`` if passes hold more than one sequence."""
        return self._backend.engine(name, batched)

    def graph_engine(self, name: str, batched: bool = False) -> GraphEngine:
        """The engine of a trained drafter's graph, loaded on first use."""
        return self._backend.graph_engine(name, batched)

    def speculation_modes(self) -> list[str]:
        """What ``speculate`` may be for this bundle, plain decoding (``off``) first."""
        return self._choice().modes()

    def _choice(self) -> DrafterChoice:
        return DrafterChoice(self.files, self.schedule.costs, self.phrases, self.engine, self.graph_engine)

    # A str is a Sequence[str] too, hence the ignore: the first signature that fits is taken.
    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        speculate: Speculate = None,
        drafting: DraftOptions | None = None,
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Prompt | TokenArray],
        params: Params = None,
        *,
        speculate: Speculate = None,
        drafting: DraftOptions | None = None,
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]: ...

    @overload
    def generate(
        self,
        prompt: TokenArray,
        params: Params = None,
        *,
        speculate: Speculate = None,
        drafting: DraftOptions | None = None,
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> Generation | list[Generation]: ...

    @overload
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt | TokenArray] | TokenArray,
        params: Params = None,
        *,
        speculate: Speculate = None,
        drafting: DraftOptions | None = None,
        stream: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> Stream: ...

    @overload
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt | TokenArray] | TokenArray,
        params: Params = None,
        *,
        speculate: Speculate = None,
        drafting: DraftOptions | None = None,
        stream: bool,
        **options: Unpack[GenerateOptions],
    ) -> Generation | list[Generation] | Stream: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt | TokenArray] | TokenArray,
        params: Params = None,
        *,
        speculate: Speculate = None,
        drafting: DraftOptions | None = None,
        stream: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Generation | list[Generation] | Stream:
        """Generate text: a :class:`Generation`, a list of them for a list of prompts, or a :class:`Stream`.

        The types say which: a ``str``, ``bytes`` or ``Sequence[int]`` is one prompt, any other sequence holds prompts,
        and an array may be either. The choice at run time depends on the values alone.

        Args:
            prompt: text, UTF-8 bytes or token ids (a list, a tuple, a numpy array or a torch tensor); or a list of
                those, which gives a list of generations.
            params: how tokens are drawn; a sequence has one setting for each prompt.
            speculate: ``auto``, ``off``, names of drafters joined with ``+`` (see :meth:`speculation_modes`), or
                drafters of your own. False is ``off``, True and None are ``auto``. It changes the speed, never the
                text.
            drafting: how trained drafters draft.
            stream: return a :class:`Stream` instead of waiting.
            options: the keywords below.

        Keyword Args:
            max_new_tokens: most tokens to generate; None for 256 or what fits.
            temperature: shorthand for ``params``, like ``top_k``, ``top_p`` and ``min_p``: 0 for greedy text, and
                filters, in this order.
            seed: of the random numbers, which depend on seed, prompt and position, not on what runs beside it.
            stop: strings that end the text.
            chat: each prompt is a user's message; the chat template is applied.
            template_variables: what the chat template reads beside the message, such as ``{"enable_thinking": False}``.
            ignore_eos: go on after an end-of-text token (for measurements).
            draft_length: draft this many tokens in every round, even where it does not pay; None adapts.
            draft_sampling: shorthand for ``drafting``, like ``confidence_threshold`` and ``draft_branches``: how
                trained drafters draft for requests with a temperature. ``coupled``: with the target's own random
                numbers, the text stays that of plain decoding; ``greedy``: the most likely tokens, likewise;
                ``rejection``: independently, verified by rejection sampling. The text then has the same
                distribution, but is another one than plain decoding's, and ``draft_length`` is not looked at.
            confidence_threshold: drop the rest of a draft from the first token whose confidence is below this, before
                it is verified; for drafters with a confidence head.
            draft_branches: most tokens of a trained draft's tree that may follow one, 1 for a chain; None for its
                default.
            batch_size: most prompts that run together; fewer where an engine takes fewer.

        Raises:
            UsageError: an option or a prompt outside its range, more or fewer ``params`` than prompts, or a shorthand
                keyword beside the setting it is short for.
            CapacityError: a prompt with its new tokens does not fit.
        """
        refuse_unknown("generate()", {n: v for n, v in options.items() if n not in _OPTIONS}, _OPTIONS)
        asked: GenerateOptions = {**DEFAULTS, **options}
        chat, variables = asked["chat"], asked["template_variables"]
        if variables is not None and not chat:
            raise UsageError("template_variables are the chat template's; give chat=True, or messages to chat()")
        prompts, single = plain_prompts(prompt, self.manifest.model.pad_token_id)
        encoded = [self._encode(item, variables if chat else None, chat) for item in prompts]
        result = self._start(encoded, params, speculate, drafting, asked)
        if stream:
            return result
        generations = result.finish()
        return generations[0] if single else generations

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: Params = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        template_variables: Mapping[str, object] | None = None,
        speculate: Speculate = None,
        drafting: DraftOptions | None = None,
        stream: Literal[False] = False,
        **options: Unpack[CallOptions],
    ) -> Generation: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: Params = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        template_variables: Mapping[str, object] | None = None,
        speculate: Speculate = None,
        drafting: DraftOptions | None = None,
        stream: Literal[True],
        **options: Unpack[CallOptions],
    ) -> Stream: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: Params = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        template_variables: Mapping[str, object] | None = None,
        speculate: Speculate = None,
        drafting: DraftOptions | None = None,
        stream: bool,
        **options: Unpack[CallOptions],
    ) -> Generation | Stream: ...

    def chat(
        self,
        messages: Sequence[Message],
        params: Params = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        template_variables: Mapping[str, object] | None = None,
        speculate: Speculate = None,
        drafting: DraftOptions | None = None,
        stream: bool = False,
        **options: Unpack[CallOptions],
    ) -> Generation | Stream:
        """Answer a conversation: a :class:`Generation`, or a :class:`Stream`.

        Args:
            messages: a list of ``{"role": ..., "content": ...}``.
            params: as for :meth:`generate`, like ``speculate``, ``drafting``, ``stream`` and all ``options``.
            tools: JSON schemas of functions the model may ask for.
            documents: texts it may quote, each a mapping.
            template_variables: what else the model's chat template reads, such as ``{"enable_thinking": False}``.
        """
        for name in ("prompt", "chat"):
            if name in options:
                raise UsageError(f"chat() has no option {name!r}: the conversation is its first argument")
        refuse_unknown("chat()", {n: v for n, v in options.items() if n not in _OPTIONS}, _OPTIONS)
        variables = {**by_name("template_variables", template_variables), "tools": tools, "documents": documents}
        encoded = self.codec.encode_chat(messages, **variables)
        result = self._start([encoded], params, speculate, drafting, {**DEFAULTS, **options})
        return result if stream else result.finish()[0]

    def _start(
        self,
        prompts: Sequence[Ids],
        params: Params,
        speculate: Speculate,
        drafting: DraftOptions | None,
        options: GenerateOptions,
    ) -> Stream:
        """A stream over the encoded ``prompts``, with everything checked; ``options`` with their defaults."""
        requests = make_requests(
            prompts,
            self.limits,
            max_new_tokens=options["max_new_tokens"],
            params=sampling_params(params, options),
            seed=options["seed"],
            stop=options["stop"],
            eos=() if options["ignore_eos"] else self.manifest.model.eos_token_ids,
        )
        if self._codec is None and any(request.stops for request in requests):
            raise UsageError("stop strings need a tokenizer, and this bundle has none; leave out stop")
        draft_length = options["draft_length"]
        if draft_length is not None:
            draft_length = whole("draft_length", draft_length, 0, 31)
        batch_size = whole("batch_size", options["batch_size"], 1, 1024)
        batch_size = min(batch_size, self._backend.limits.batch or batch_size)
        rows = min(len(requests), batch_size)
        drafters = self._choice().make(speculate, rows > 1, draft_options(drafting, options))
        schedule = self.schedule
        if draft_length is not None:
            schedule = self._new_schedule(schedule.costs, draft_length)
        target = self.engine("target", rows > 1)
        longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
        cut, observer = self._cut(), self._observer
        return Stream(lambda: self._loop(target, schedule, drafters, rows, longest, cut, observer), requests)

    def _loop(
        self,
        target: Engine,
        schedule: Schedule,
        drafters: Sequence[Drafter],
        rows: int,
        longest: int,
        options: LoopOptions,
        observer: Observer,
    ) -> DecodingLoop:
        """A loop with room for ``longest`` tokens in each of its rows."""
        tokenizer = None if self._codec is None else self._codec.tokenizer
        return DecodingLoop(target, schedule, drafters, rows, longest, tokenizer, options, observer)

    def _cut(self) -> LoopOptions:
        """How passes are cut for the backend and the setting of ``exact``."""
        limits = self._backend.limits
        most_drafts = min(LoopOptions.most_drafts, limits.rows - 1)
        return LoopOptions(prefill_chunk=limits.chunk, min_rows=self._min_rows, most_drafts=most_drafts)

    def serve(self, options: ServiceOptions | None = None, observer: ServiceObserver | None = None) -> Service:
        """Start a service: requests of any number of threads, which join and leave while others run.

        Args:
            options: sizes and rules; None for the defaults.
            observer: hears what the service and its loop do.

        Raises:
            UsageError: ``options.speculate`` names nothing this bundle has; or texts are to be exact, and depend on
                what runs beside them, or it was not measured whether they do.
            CapacityError: the caches do not fit the memory; the message says how many rows would.
        """
        options = options or ServiceOptions()
        rows = min(options.rows, self._backend.limits.batch or options.rows)
        options = replace(options, rows=rows)
        if self.exact and rows > 1:
            require_equal_batches(self.files, self._backend)
        capacity = min(options.capacity or DEFAULT_CAPACITY, self.limits.positions)
        target = self.engine("target", rows > 1)
        schedule = self._new_schedule()
        check_memory(self.manifest, rows, capacity, options.memory)
        # Where a row's bits depend on its pass, context that was computed otherwise could change an exact text.
        reuse = options.reuse_prefixes and (self._backend.rows_are_equal or not self.exact)
        cut = replace(self._cut(), first_slots=capacity + MOST_ROWS, reuse_prefixes=reuse)
        observer = observer or ServiceObserver()

        def open_loop() -> DecodingLoop:
            drafters = self._choice().make(options.speculate, rows > 1, options.drafting)
            return self._loop(target, schedule, drafters, rows, capacity, cut, observer)

        return Service(
            open_loop,
            options,
            Limits(self.limits.vocab_size, capacity),
            eos=self.manifest.model.eos_token_ids,
            fixed_chunks=not self._backend.rows_are_equal,
            observer=observer,
        )

    def _encode(self, prompt: Text | Ids, variables: Mapping[str, object] | None, chat: bool) -> Ids:
        if isinstance(prompt, list):
            if chat:
                raise UsageError("with chat=True a prompt is a user's message, a text; token ids go without chat")
            return prompt
        if chat:
            message = {"role": "user", "content": prompt}
            return self.codec.encode_chat([message], **by_name("template_variables", variables))
        return self.codec.encode(prompt)

    def _costs(self) -> PassCosts:
        costs = self.manifest.costs
        known = costs.ms.get("target", {}) if costs is not None else {}
        return PassCosts({int(rows): ms for rows, ms in known.items() if ms > 0})


def _phrase_store(files: BundleFiles, options: PhraseOptions | None) -> PhraseStore:
    """Of the bundle, with its corpus if it has one."""
    tokenizer = files.manifest.files.get(f"{TOKENIZER_DIR}/tokenizer.json")
    digest = "" if tokenizer is None else tokenizer.sha256
    return PhraseStore(files.manifest.model.vocab_size, bundle_corpus(files), options, digest)


_OPTIONS = ("params", "speculate", "drafting", "stream", *GenerateOptions.__annotations__)
