"""``dspark-export inspect``: what is in a bundle, and whether it is intact."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_export.cli.arguments import BundleFolder
from dspark_export.graphs.layer_choice import describe_layers

if TYPE_CHECKING:
    from rich.table import Table

    from dspark_runtime.bundle.files import BundleFiles
    from dspark_runtime.bundle.manifest import GraphEntry, Manifest, RowNoise


def inspect(
    bundle: BundleFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    verify: Annotated[bool, typer.Option(help="Check the SHA-256 of every file.")] = True,
    operators: Annotated[bool, typer.Option("--operators", help="Count the operators of every graph.")] = False,
) -> None:
    """Show source, model, precision, graphs, nodes without a kernel, drafters, costs and files of BUNDLE."""
    # pydantic: only when a bundle is opened
    from dspark_runtime.bundle.files import BundleFiles

    files = BundleFiles.open(bundle, verify=verify)
    counts = {graph.file: _count_operators(files, graph) for graph in files.manifest.graphs}
    if as_json:
        facts: dict[str, Any] = {"bundle": str(files.root), "digests_verified": verify, "operators": counts}
        typer.echo(json.dumps({**facts, "manifest": files.manifest.model_dump()}))
        return
    from rich.console import Console

    console = Console()
    for table in _tables(files.manifest, counts, verify, operators):
        console.print(table)


def _count_operators(files: BundleFiles, graph: GraphEntry) -> dict[str, int]:
    import onnx_ir as ir

    model = ir.load(files.path(graph.file))
    names = (node.op_type if not node.domain else f"{node.domain}.{node.op_type}" for node in model.graph.all_nodes())
    return dict(Counter(names).most_common())


def _tables(manifest: Manifest, counts: dict[str, dict[str, int]], verified: bool, operators: bool) -> list[Table]:
    tables = [_overview(manifest), _graphs(manifest, counts), _drafters(manifest)]
    if any(graph.variant == "sequence-kernels" for graph in manifest.graphs):
        tables.insert(2, _standard_nodes(manifest))
    if operators:
        tables += [_operators(file, count) for file, count in counts.items()]
    if manifest.precision.in_floats:
        tables.append(_in_floats(manifest))
    if manifest.source.unread:
        tables.append(_unread(manifest))
    if manifest.costs:
        tables.append(_costs(manifest))
    return [*tables, _files(manifest, verified)]


def _table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", show_header=bool(columns[0]))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _overview(manifest: Manifest) -> Table:
    table = _table("bundle", "", " ")
    model, precision, source = manifest.model, manifest.precision, manifest.source
    cache = Counter((layer.kv_heads, layer.key_dim, layer.value_dim, layer.window) for layer in model.cache)
    shapes = ", ".join(
        f"{count} x {heads} heads of {key}"
        + (f"/{value}" if value != key else "")
        + (f", window {window}" if window else "")
        for (heads, key, value, window), count in cache.items()
    )
    rows = {
        "source": f"{source.kind} {source.id}" + (f" at {source.revision}" if source.revision else ""),
        "model": f"{model.architecture} ({model.model_type}), {model.num_layers} layers, hidden {model.hidden_size}",
        "vocabulary": f"{model.vocab_size}, ends with {list(model.eos_token_ids)}, begins with {model.bos_token_id}",
        "positions": str(model.max_positions),
        "cache": shapes,
        "precision": _precision(manifest),
        "row noise": _row_noise(precision.row_noise),
        "made by": f"{manifest.created_by}, {manifest.created_at}",
        "tools": ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items()),
    }
    rows |= {key: json.dumps(value) for key, value in manifest.validation.items()}
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _precision(manifest: Manifest) -> str:
    precision = manifest.precision
    parts: list[str] = [precision.weights]
    if precision.block_size:
        parts.append(f"blocks of {precision.block_size}")
    if precision.quantized:
        parts += [
            f"{part} {'included' if on else 'kept'}"
            for part, on in (("head", precision.head), ("embedding", precision.embedding))
        ]
    called = {kernel for graph in manifest.graphs for kernel in graph.kernels}
    if precision.weights == "fp32" and called & {"ProductFloat16", "ProductBFloat16"}:
        parts.append("weights kept in the 16 bits that hold them")
    parts.append("exact" if precision.exact else "not exact")
    if precision.accuracy_level is not None:
        parts.append(f"accuracy level {precision.accuracy_level}")
    return ", ".join(parts)


def _row_noise(noise: RowNoise | None) -> str:
    if noise is None:
        return "not measured"
    rows, beside = ", ".join(map(str, noise.rows)), noise.between_batches
    return (
        f"logits differ by up to {noise.max_abs_logit_diff:.3g} between passes over 1 and over {rows} rows, "
        f"by {noise.without_single_rows:.3g} among the latter ({noise.positions} positions), "
        + ("not measured beside others" if beside is None else f"by {beside:.3g} alone and beside others")
    )


def _graphs(manifest: Manifest, counts: dict[str, dict[str, int]]) -> Table:
    table = _table("graphs", "graph", "variant", "dtype", "layers", "nodes", "file", right=("nodes",))
    for graph in manifest.graphs:
        layers = "" if graph.layers is None else describe_layers(graph.layers)
        table.add_row(graph.name, graph.variant, graph.dtype, layers, str(sum(counts[graph.file].values())), graph.file)
    return table


def _standard_nodes(manifest: Manifest) -> Table:
    table = _table("nodes without a sequence kernel", "graph", "operator", "nodes", right=("nodes",))
    for graph in manifest.graphs:
        if graph.variant == "sequence-kernels":
            for name, number in graph.standard_nodes.items() or (("none", 0),):
                table.add_row(graph.name, name, str(number))
    return table


def _drafters(manifest: Manifest) -> Table:
    table = _table("drafters", "drafter", "kind", "agreement", "settings", right=("agreement",))
    for drafter in manifest.drafters:
        agreement = "" if drafter.agreement is None else f"{drafter.agreement:.2f}"
        settings = {key: value for key, value in drafter.settings.items() if key != "layers"}  # among the graphs
        shown = json.dumps(settings) if settings else ""
        if (phrases := drafter.phrases) is not None:
            shown = f"{phrases.contexts} contexts of {phrases.tokens} tokens, prompts: {phrases.origin}"
        table.add_row(drafter.name, drafter.kind, agreement, shown)
    return table


def _in_floats(manifest: Manifest) -> Table:
    table = _table("integers in the checkpoint, floats in the graphs", "weight", "why")
    for name, reason in manifest.precision.in_floats.items():
        table.add_row(name, reason)
    return table


def _unread(manifest: Manifest) -> Table:
    table = _table("in the checkpoint, not in the graphs", "tensor or setting", "why")
    for name, reason in manifest.source.unread.items():
        table.add_row(name, reason)
    return table


def _operators(file: str, count: dict[str, int]) -> Table:
    table = _table(f"operators of {file}", "operator", "nodes", right=("nodes",))
    for name, number in count.items():
        table.add_row(name, str(number))
    return table


def _costs(manifest: Manifest) -> Table:
    costs = manifest.costs
    assert costs is not None
    names = list(costs.ms)
    title = f"milliseconds of a pass, {costs.threads} threads, {costs.device}, context {costs.context}"
    table = _table(title, "rows", *names, right=("rows", *names))
    for row in sorted({int(row) for cost in costs.ms.values() for row in cost}):
        cells = (costs.ms[name].get(str(row)) for name in names)
        table.add_row(str(row), *("" if cell is None else f"{cell:.2f}" for cell in cells))
    return table


def _files(manifest: Manifest, verified: bool) -> Table:
    title = "files, digests verified" if verified else "files, digests not checked"
    table = _table(title, "file", "bytes", "sha256", right=("bytes",))
    for name, entry in sorted(manifest.files.items()):
        table.add_row(name, f"{entry.size:,}", entry.sha256[:16])
    return table
