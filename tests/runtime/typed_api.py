"""What type checkers see of the Python API; mypy reads this file, nothing runs it.

An ignore that is no longer needed is an error here: each one marks a call that must be refused.
"""

# mypy: warn-unused-ignores

from __future__ import annotations

from typing import assert_type

import numpy as np

from dspark_runtime import Bundle, Drafter, DraftOptions, Generation, SamplingParams, Stream


def one_prompt(bundle: Bundle, ids: list[int]) -> None:
    assert_type(bundle.generate("text"), Generation)
    assert_type(bundle.generate(b"bytes", max_new_tokens=4, temperature=0.5, stop=["."]), Generation)
    assert_type(bundle.generate(ids), Generation)
    assert_type(bundle.generate((5, 6, 7), SamplingParams(0.8), stream=False), Generation)
    assert_type(bundle.generate(range(5, 9), chat=False, template_variables={"a": 1}), Generation)


def many_prompts(bundle: Bundle, ids: list[int]) -> None:
    assert_type(bundle.generate(["a", "b"]), list[Generation])
    assert_type(bundle.generate([ids, ids], [SamplingParams(), SamplingParams(0.8)]), list[Generation])
    assert_type(bundle.generate(("a", b"b", ids, np.array(ids))), list[Generation])


def arrays(bundle: Bundle) -> None:
    assert_type(bundle.generate(np.array([5, 6])), Generation | list[Generation])
    assert_type(bundle.generate(np.array([5, 6]), stream=True), Stream)


def streams(bundle: Bundle, stream: bool) -> None:
    assert_type(bundle.generate("text", stream=True), Stream)
    assert_type(bundle.generate(["a", "b"], params=[SamplingParams()] * 2, stream=True), Stream)
    assert_type(bundle.generate("text", stream=stream), Generation | list[Generation] | Stream)


def conversations(bundle: Bundle, stream: bool) -> None:
    messages = [{"role": "user", "content": "hello"}]
    assert_type(bundle.chat(messages), Generation)
    assert_type(bundle.chat(messages, SamplingParams(0.8), tools=[{"name": "f"}], max_new_tokens=4), Generation)
    assert_type(bundle.chat(messages, stream=True, speculate=False), Stream)
    assert_type(bundle.chat(messages, stream=stream), Generation | Stream)


def speculation(bundle: Bundle, drafter: Drafter, own: list[Drafter]) -> None:
    for speculate in (None, True, False, "ngram"):
        assert_type(bundle.generate("text", speculate=speculate), Generation)
    assert_type(bundle.generate("text", speculate=drafter), Generation)
    assert_type(bundle.generate("text", speculate=own, drafting=DraftOptions("greedy", branches=1)), Generation)


def refused(bundle: Bundle) -> None:
    bundle.generate("text", max_tokens=4)  # type: ignore[call-overload]
    bundle.generate("text", temperature="hot")  # type: ignore[call-overload]
    bundle.generate("text", draft_sampling="coupeld")  # type: ignore[call-overload]
    bundle.generate("text", speculate=1.5)  # type: ignore[call-overload]
    bundle.generate("text", drafting=SamplingParams())  # type: ignore[call-overload]
    bundle.generate([["a"]])  # type: ignore[list-item]
    bundle.generate(5)  # type: ignore[call-overload]
    bundle.chat("hello")  # type: ignore[arg-type]
    bundle.chat([{"role": "user"}], chat=True)  # type: ignore[call-overload]
