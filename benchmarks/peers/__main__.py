"""This project beside transformers, onnxruntime-genai, OpenVINO GenAI and llama.cpp on the same weights and prompts.

    python -m benchmarks.peers --model MODEL.gguf --out peers-out --threads 2

All formats of the model are made below --out once and reused. The table goes to stdout; peers.json and peers.png go to
--out. Other programs run in processes of their own. One that cannot take part, or crashes, is named with its reason.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks.peers import genai_peer, llama_cpp_peer, openvino_peer, own, transformers_peer
from benchmarks.peers.apart import ApartPeer, Crashed, apart
from benchmarks.peers.limits import measure_products
from benchmarks.peers.measure import measure
from benchmarks.peers.models import SharedModel
from benchmarks.peers.protocol import Candidate, Missing, Peer
from benchmarks.peers.report import Conditions, draw, print_report, to_json
from dspark_export.bench.bandwidth import bytes_per_token, measure_bandwidth
from dspark_export.prompts.sets import SHIPPED, PromptItem, load_sets
from dspark_export.prompts.texts import encode
from dspark_runtime import Bundle
from dspark_runtime.errors import DsparkError
from dspark_runtime.processors import this_machine


def say(text: str) -> None:
    """One line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def load_all(candidates: list[Candidate]) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can take part, and why the others cannot."""
    peers: list[Peer] = []
    missing: dict[str, str] = {}
    for number, candidate in enumerate(candidates, 1):
        say(f"loading {number} of {len(candidates)}: {candidate.name}")
        try:
            peers.append(candidate.load())
        except Missing as reason:
            missing[candidate.name] = str(reason)
        except Crashed as reason:
            missing[candidate.name] = f"crashed: {reason}"
    return peers, missing


def arguments() -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="GGUF file, folder or hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--draft", help="a trained drafter of the model, for this project's bundles")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", action="append", help=f"set ({', '.join(SHIPPED)}) or file; default: all sets")
    parser.add_argument("--limit", type=int, default=1, help="prompts of each set")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="only peers whose name this regular expression finds")
    return parser.parse_args()


def main() -> int:
    """Returns the exit code."""
    given = arguments()
    model = SharedModel(given.model, given.out, given.draft)
    try:
        items = load_sets(given.prompts or list(SHIPPED), given.limit)
        all_candidates = [*own.candidates(model, given.threads)]
        for source in (transformers_peer, genai_peer, openvino_peer, llama_cpp_peer):
            found = source.candidates(model, given.threads)
            all_candidates += [apart(source.__name__, c, model, given.threads) for c in found]
        peers, missing = load_all([c for c in all_candidates if re.search(given.only, c.name)])
        ids, conditions = _conditions(given, model, items, peers)
    except (DsparkError, Missing) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with measuring(len(peers) * len(ids) * given.repeats) as step:
        try:
            results, crashed = measure(
                peers, ids, max_new_tokens=given.max_new_tokens, repeats=given.repeats, on_step=step
            )
        finally:
            for peer in peers:
                if isinstance(peer, ApartPeer):
                    peer.close()
    missing |= {name: f"crashed: {reason}" for name, reason in crashed.items()}
    print_report(Console(width=max(110, Console().width)), conditions, results, missing)
    (given.out / "peers.json").write_text(json.dumps(to_json(conditions, results, missing), indent=1) + "\n")
    draw(conditions, results, given.out / "peers.png")
    return 0


@contextmanager
def measuring(total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, elsewhere a line for every twentieth of the runs; gives what to call after each run."""
    console = Console(stderr=True)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if done * 20 // total > (done - 1) * 20 // total:
            say(f"measured {done} of {total} runs")

    if not console.is_terminal:
        yield step
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=total)
        yield lambda: progress.advance(task)


def _conditions(
    given: argparse.Namespace, model: SharedModel, items: list[PromptItem], peers: list[Peer]
) -> tuple[list[list[int]], Conditions]:
    """Prompts as token ids of the one tokenizer all peers share, and the facts of the run."""
    measured = {"fp32", *(peer.precision for peer in peers if peer.setting is not None)}
    bundles = {p: Bundle.open(model.bundle(p), verify_digests=False) for p in own.MEASURED if p in measured}
    ids = [encode(bundles["fp32"], item.text) for item in items]
    return ids, Conditions(
        model=Path(given.model).name,
        machine=this_machine(),
        threads=given.threads,
        bandwidth=measure_bandwidth(given.threads),
        weight_bytes={precision: bytes_per_token(bundle.files) for precision, bundle in bundles.items()},
        products=measure_products(given.threads),
        prompts=[item.set for item in items],
        prompt_tokens=[len(prompt) for prompt in ids],
        max_new_tokens=given.max_new_tokens,
        repeats=given.repeats,
    )


if __name__ == "__main__":
    sys.exit(main())
