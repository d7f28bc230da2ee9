"""Compares a mode's speed-up with what its accepted length and pass costs predict. Nothing here fails: a slow machine
is not the bundle's fault."""

from __future__ import annotations

import time

from dspark_export.bench.bandwidth import bytes_per_token, measure_bandwidth
from dspark_export.prompts.texts import PLAIN
from dspark_export.validate.checks import Check
from dspark_export.validate.lossless import Texts
from dspark_runtime import Bundle, Generation
from dspark_runtime.decoding.statistics import Statistics
from dspark_runtime.speculation.costs import measure_pass_ms

_ROWS = (1, 2, 4, 8, 16)
FORMULA = "tokens per round x plain pass / (verify pass + draft + host)"


def check_costs(bundle: Bundle, threads: int) -> tuple[Check, dict[int, float]]:
    """Milliseconds of a target pass by rows, now and when the bundle was built, and the limit of memory bandwidth."""
    began = time.perf_counter()
    context = min(256, bundle.limits.positions // 2)
    rows = [n for n in _ROWS if context + n <= bundle.limits.positions]
    now = measure_pass_ms(bundle.target, rows, context=context, repeats=3)
    costs = bundle.manifest.costs
    then = {} if costs is None else {n: costs.ms.get("target", {}).get(str(n)) for n in rows}
    size = bytes_per_token(bundle.files)
    bandwidth = measure_bandwidth(threads)
    check = Check(
        id="speed.costs",
        family="speed",
        title="One plain pass",
        status="passed",
        measured=now[rows[0]],
        unit="ms",
        message=f"{size / 1e6:.0f} MB of weights at {bandwidth.read / 1e9:.1f} GB/s allow no less than "
        f"{1e3 * size / bandwidth.read:.2f} ms.",
        seconds=time.perf_counter() - began,
        data={
            "rows": list(rows),
            "now_ms": [now[n] for n in rows],
            "built_ms": [then.get(n) for n in rows],
            "limit_ms": 1e3 * size / bandwidth.read,
            "weight_bytes": size,
            "bandwidth": bandwidth.read,
        },
    )
    return check, now


def check_mode(mode: str, texts: Texts, costs: dict[int, float]) -> Check:
    """The speed-up of ``mode`` over plain decoding, predicted and measured on the same texts."""
    plain, mine = (_total(texts.alone[name]) for name in (PLAIN, mode))
    rows = 1 + mine.verified / max(1, mine.rounds)
    length = mine.accepted_length
    draft, host = (1e3 * getattr(mine.seconds, phase) / max(1, mine.rounds) for phase in ("draft", "host"))
    verify = _interpolated(costs, rows)
    predicted = length * costs[min(costs)] / (verify + draft + host) if mine.rounds else None
    measured = mine.tokens_per_second / plain.tokens_per_second if plain.tokens_per_second and mine.rounds else None
    return Check(
        id=f"speed.{mode}",
        family="speed",
        title=f"{mode} against plain decoding",
        status="passed",
        measured=measured,
        unit="times plain decoding",
        message=""
        if predicted is None
        else f"{length:.2f} tokens per round, {rows:.1f} rows per pass: {verify:.1f} ms to verify, {draft:.2f} to "
        f"draft, {host:.2f} of the host predict {predicted:.2f}x.",
        data={
            "predicted": predicted,
            "measured": measured,
            "accepted_length": length,
            "rows": rows,
            "verify_ms": verify,
            "draft_ms": draft,
            "host_ms": host,
            "tokens_per_second": mine.tokens_per_second,
            "plain_tokens_per_second": plain.tokens_per_second,
        },
    )


def _interpolated(costs: dict[int, float], rows: float) -> float:
    import numpy as np

    known = sorted(costs)
    return float(np.interp(rows, known, [costs[n] for n in known]))


def _total(generations: list[Generation]) -> Statistics:
    return Statistics.total([generation.stats for generation in generations])
