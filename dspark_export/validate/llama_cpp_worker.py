"""Runs llama.cpp on texts of token ids, one JSON line of logits by token id each; a script of its own, started by
``llama_cpp.py`` with the library's name, the job on standard input."""

import json
import sys
from collections.abc import Iterator
from typing import Any


def with_xllamacpp(job: dict[str, Any]) -> Iterator[dict[int, float]]:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = job["model"]
    settings.n_ctx = job["context"]
    settings.n_predict = 1
    settings.cpuparams.n_threads = job["threads"]
    settings.warmup = False
    settings.yarn_beta_fast = settings.yarn_beta_slow = -1.0
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    for text in job["texts"]:
        request = {
            "prompt": text,
            "n_predict": 1,
            "temperature": 0.0,
            "n_probs": 2**30,
            "cache_prompt": False,
            "logit_bias": [[job["plain_token"], 1000.0]],  # what is drawn; the logits are given as they were
        }
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, bytes | str) else answer
        found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        yield {entry["id"]: entry["logprob"] for entry in found}


def with_llama_cpp(job: dict[str, Any]) -> Iterator[dict[int, float]]:
    from llama_cpp import Llama

    model = Llama(
        model_path=job["model"], n_ctx=job["context"], n_threads=job["threads"], logits_all=True, verbose=False
    )
    for text in job["texts"]:
        model.reset()
        model.eval(text)
        yield dict(enumerate(map(float, model.scores[len(text) - 1])))


if __name__ == "__main__":
    run = {"xllamacpp": with_xllamacpp, "llama_cpp": with_llama_cpp}[sys.argv[1]]
    for row in run(json.load(sys.stdin)):
        print("LOGITS " + json.dumps(row), flush=True)
