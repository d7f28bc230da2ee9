"""Which size of a block drafter gives the most tokens per second?

    python benchmarks/drafter_sweep.py BUNDLE MODEL WORK DRAFTER [DRAFTER ...] --vocabularies 4096,8192 --blocks 2,3,4

BUNDLE gives the cost of a target pass on this machine (built here, see its manifest); WORK is the work folder of
``train-drafter``, whose held-out responses are used for scoring; DRAFTERs are what it trained. Each is tried with its
draft vocabulary cut to the most frequent tokens of the responses, and with shorter blocks. Accepted length is counted
on the responses, of the chain and of trees; the pass of the drafter is timed with ONNX Runtime after 200 tokens;
together with the target's measured passes they give the speed, here that of the best size of tree:

    tokens per second = accepted length / (draft pass + target pass of drafts + 1 rows)

The schedule of the runtime chooses a size for every round and is better than the best fixed one.

A table goes to stdout (``--json``: the same as JSON), progress to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dspark_export.bundle.weights import save_graphs
from dspark_export.checkpoints import resolve
from dspark_export.drafts.extras import stored_vocabulary
from dspark_export.drafts.formats import recognise
from dspark_export.drafts.formats.draft import BlockConfig, DraftCheckpoint
from dspark_export.drafts.graphs.block import export_block_drafter
from dspark_export.drafts.modules.beams import BEAMS, CANDIDATES
from dspark_export.passes import optimize, ort_cpu_variants
from dspark_export.passes.inner_values import hide_inner_values
from dspark_export.passes.precision import PrecisionSettings, apply_precision
from dspark_export.train.evaluate import evaluate, tree_lengths
from dspark_export.train.features import FeatureStore, Sample
from dspark_export.train.module import TrainableDrafter
from dspark_export.train.responses import read_responses
from dspark_export.train.saving import load_drafter
from dspark_export.train.targets import embedding_and_head, frequent_tokens
from dspark_runtime import Bundle
from dspark_runtime.backends.ort_graph import OrtGraphEngine
from dspark_runtime.backends.protocol import EngineOptions
from dspark_runtime.bundle.contract import CacheLayer
from dspark_runtime.bundle.precisions import PRECISIONS, Weights
from dspark_runtime.speculation.costs import PassCosts

CONTEXT, NEW, REPEATS = 200, 2, 40
DRAFTS = (3, 5, 7, 11, 15, 23, 31)  # sizes of trees
Tables = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Row:
    """One size. ``accepted_length`` is the chain's, ``tree_length`` that of the best tree, of ``drafts`` tokens.
    ``ratio``: its speed against plain decoding with the same costs."""

    drafter: str
    layers: int
    rank: int
    block: int
    vocabulary: int
    precision: str
    accepted_length: float
    drafts: int
    tree_length: float
    draft_ms: float
    tokens_per_second: float
    ratio: float


def pass_ms(
    checkpoint: DraftCheckpoint, tables: Tables, ids: torch.Tensor | None, precision: Weights, threads: int
) -> float:
    """Median milliseconds of a pass of the drafter's graph with this draft vocabulary."""
    config = checkpoint.config
    assert isinstance(config, BlockConfig)
    graph = export_block_drafter(
        checkpoint,
        embedding=tables[0],
        head=tables[1],
        name="dspark",
        dtype="float32",
        candidates=CANDIDATES,
        beams=BEAMS,
        draft_vocabulary=ids,
    )
    optimize(graph)
    apply_precision(graph, PrecisionSettings(precision))
    layers, block = config.layers, config.block
    with tempfile.TemporaryDirectory() as folder:
        variant = hide_inner_values(ort_cpu_variants(graph, 2048)["onnxruntime-cpu"])
        path = save_graphs({"dspark": variant}, Path(folder))["dspark"]
        cache = [CacheLayer(layers.kv_heads, layers.head_dim, layers.head_dim)] * layers.count
        engine = OrtGraphEngine(path, name="dspark", cache=cache, options=EngineOptions(threads=threads))
        runner = engine.open(engine.allocate(1, 512))
        behind, slots = CONTEXT + NEW, CONTEXT + NEW + block
        inputs = {
            "target_features": np.random.default_rng(0).normal(size=(1, NEW, len(config.taps) * layers.hidden_size)),
            "feature_positions": np.arange(CONTEXT, behind)[None],
            "anchor_ids": np.array([5]),
            "block_positions": np.arange(behind, slots)[None],
            "attention_mask": np.ones((1, 1, block, slots), bool),
            "write_indices": np.array([CONTEXT]),
            "temperature": np.zeros(1, np.float32),
            "uniforms": np.zeros((1, config.drafts), np.float32),
        }
        inputs["target_features"] = inputs["target_features"].astype(np.float32)
        times = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            runner.run({name: value for name, value in inputs.items() if name in engine.inputs})
            times.append((time.perf_counter() - began) * 1e3)
    return float(np.median(times[3:]))


def accepted_lengths(
    model: TrainableDrafter, tables: Tables, ids: torch.Tensor | None, block: int, held_out: list[Sample]
) -> tuple[float, dict[int, float]]:
    """Tokens per round, the bonus included, of a drafter with this draft vocabulary and block: of its chain, and of
    its trees by size."""
    geometry = dataclasses.replace(model.geometry, block=block)
    cut = TrainableDrafter(geometry, *tables, ids)
    cut.load_state_dict(model.state_dict())
    return evaluate(cut, held_out, torch.float32).accepted_length, tree_lengths(cut, held_out, torch.float32, DRAFTS)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parser.add_argument("drafters", type=Path, nargs="+")
    parser.add_argument("--vocabularies", default="", help="sizes, with commas; the trained one is always measured")
    parser.add_argument("--blocks", default="", help="lengths, with commas; the trained one is always measured")
    parser.add_argument("--precisions", default="fp32", help=f"with commas: {', '.join(PRECISIONS)}")
    parser.add_argument("--responses", type=Path, help="default: WORK/responses.packed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> int:
    """Returns the exit code."""
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    costs = Bundle.open(arguments.bundle).manifest.costs
    if costs is None:
        sys.exit(f"{arguments.bundle} has no measured costs; build it on this machine")
    target = PassCosts({int(rows): ms for rows, ms in costs.ms["target"].items()})
    checkpoint = resolve(arguments.model)
    tables = embedding_and_head(checkpoint.load_model(torch.float32))
    responses = list(read_responses(arguments.responses or arguments.work / "responses.packed"))
    rows: list[Row] = []
    for folder in arguments.drafters:
        draft = recognise(str(folder))
        assert isinstance(draft, DraftCheckpoint)
        config = draft.config
        assert isinstance(config, BlockConfig)
        model = load_drafter(folder, *tables)
        width = len(model.geometry.taps) * model.geometry.hidden
        store = FeatureStore(arguments.work / "held_out", width, 64)
        held_out = [store[i] for i in range(len(store))]
        own = stored_vocabulary(folder, config.vocab_size)
        whole = len(own) if own is not None else config.vocab_size
        sizes = sorted({*(int(n) for n in arguments.vocabularies.split(",") if n if int(n) < whole), whole})
        blocks = sorted({*(int(n) for n in arguments.blocks.split(",") if n if int(n) < config.block), config.block})
        for size in sizes:
            ids = (
                own
                if size == whole
                else frequent_tokens(responses, size, config.vocab_size, config.mask_token_id, checkpoint.eos_token_ids)
            )
            for block in blocks:
                print(f"\r{folder.name}: vocabulary {size}, block {block}    ", end="", file=sys.stderr, flush=True)
                length, trees = accepted_lengths(model, tables, ids, block, held_out)
                shorter = dataclasses.replace(draft, config=dataclasses.replace(config, block=block))
                for precision in arguments.precisions.split(","):
                    ms = pass_ms(shorter, tables, ids, precision, arguments.threads)
                    speeds = {size: 1e3 * of_tree / (ms + target.ms(size + 1)) for size, of_tree in trees.items()}
                    drafts = max(speeds, key=lambda size: speeds[size])
                    speed = speeds[drafts]
                    ratio = speed * target.ms(1) / 1e3
                    rows.append(
                        Row(
                            folder.name,
                            config.layers.count,
                            config.markov_rank,
                            block,
                            size,
                            precision,
                            length,
                            drafts,
                            trees[drafts],
                            ms,
                            speed,
                            ratio,
                        )
                    )
    print(file=sys.stderr)
    rows.sort(key=lambda row: -row.tokens_per_second)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return 0
    print(
        "| drafter | layers | rank | block | vocabulary | precision | chain | drafts | tree | draft ms | tokens/s "
        "| x plain |"
    )
    print("|" + "---|" * 12)
    for row in rows:
        print(
            f"| {row.drafter} | {row.layers} | {row.rank} | {row.block} | {row.vocabulary} | {row.precision} "
            f"| {row.accepted_length:.2f} | {row.drafts} | {row.tree_length:.2f} | {row.draft_ms:.2f} "
            f"| {row.tokens_per_second:.1f} | {row.ratio:.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
