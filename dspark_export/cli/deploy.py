"""``dspark-export deploy``: what runs a bundle as a service elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dspark_export.cli.arguments import BundleFolder, Exact, Threads

Target = Literal["triton", "docker", "kserve", "ray"]


def deploy(
    bundle: BundleFolder,
    target: Annotated[
        Literal["triton", "docker", "kserve", "ray"],
        typer.Option(help="Choose the server to deploy to.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write into this new folder.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Name of the model (default: that of the bundle's folder).")] = None,
    rows: Annotated[int, typer.Option(help="Run this many requests together.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(help="Allow this many tokens of prompt and text (default: the model's positions, at most 4096)."),
    ] = None,
    queue: Annotated[int, typer.Option(help="Queue at most this many requests; one more is refused.")] = 64,
    chunk: Annotated[int, typer.Option(help="Compute at most this many prompt tokens between two rounds.")] = 128,
    speculate: Annotated[
        str, typer.Option(help="Draft with these drafters: auto, off, or names joined by +.")
    ] = "auto",
    threads: Threads = None,
    exact: Exact = None,
    backend: Annotated[
        str, typer.Option(help="Run on onnxruntime, onnxruntime-cuda, tensorrt or tensorrt-rtx.")
    ] = "onnxruntime",
    device: Annotated[int, typer.Option(help="Number of the GPU.")] = 0,
    image: Annotated[
        str | None, typer.Option(help="kserve: the container's name in your registry (default: NAME:latest).")
    ] = None,
    storage_uri: Annotated[
        str | None, typer.Option(help="kserve: get the bundle from here, such as pvc:// or s3:// (default: the image).")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="ray: run this many copies of the model.")] = 2,
    copy: Annotated[
        bool, typer.Option("--copy/--no-copy", help="Put the bundle into the folder, or refer to where it is.")
    ] = True,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Start it here and ask it one question; installs a Triton server (400 MB) if there is none."
        ),
    ] = False,
) -> None:
    """Write what serves BUNDLE: a model repository of Triton, or OpenAI's API in a container, on KServe or Ray."""
    # numpy, pydantic: only when something is deployed
    from dspark_export.deploy.check import ask_server, ask_triton
    from dspark_export.deploy.options import DeployOptions, name_of
    from dspark_export.deploy.ray_serve import write_ray
    from dspark_export.deploy.server import KServeOptions, write_server
    from dspark_export.deploy.triton import write_triton
    from dspark_serve.triton.settings import Settings

    settings = Settings.checked(
        rows=rows,
        max_length=max_length,
        queue=queue,
        chunk=chunk,
        speculate=speculate,
        threads=threads,
        exact=exact,
        backend=backend,
        device=device,
    )
    options = DeployOptions(bundle, name or name_of(bundle), settings, copy)
    if target == "triton":
        write_triton(options, out)
    elif target == "ray":
        write_ray(options, out, replicas)
    else:
        kserve = KServeOptions(image or f"{options.name.lower()}:latest", storage_uri) if target == "kserve" else None
        write_server(options, out, kserve)
    typer.echo(f"{out}: model {options.name} for {target}")
    if check:
        typer.echo(f"it answers: {(ask_triton if target == 'triton' else ask_server)(options, out)}")
    container = "" if target == "ray" else ", or docker compose up --build in that folder"
    typer.echo(f"start it:   {out}/start.sh{container}")
