"""`octavo`: the command line. Thin: flags in, one call each. No Ray and no torch until a command needs them."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from octavo.cluster.batch.command import batch, is_for_batches
from octavo.cluster.chat import chat
from octavo.cluster.config import DeploymentConfig, read_yaml
from octavo.cluster.deploy import deploy, undeploy
from octavo.cluster.doctor.command import doctor
from octavo.cluster.flags import merge, with_flags
from octavo.cluster.offline import generate
from octavo.cluster.status import status
from octavo.engine import env
from octavo.engine.errors import ConfigError

app = typer.Typer(
    name="octavo",
    help="Serves large language models on Ray: a paged, continuously batched engine behind OpenAI's API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command()
@with_flags
def serve(
    model: Annotated[str | None, typer.Argument(help="Folder, .gguf file, hub id or preset (smollm2-135m).")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Deployment YAML; flags go before it.", rich_help_panel="Server")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel="Server")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535, rich_help_panel="Server")] = 8000,
    grpc_port: Annotated[
        int | None,
        typer.Option(help="Port for gRPC; without it there is none.", min=1, max=65535, rich_help_panel="Server"),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster to join: auto or host:port. Without it, Ray starts here.", rich_help_panel="Ray"
        ),
    ] = None,
    dashboard: Annotated[bool, typer.Option(help="Start Ray's dashboard too.", rich_help_panel="Ray")] = False,
    haproxy: Annotated[bool, typer.Option(help="HAProxy in front, where installed.", rich_help_panel="Ray")] = True,
    **settings: Any,
) -> None:
    """Serve a model over OpenAI's HTTP API, and gRPC if asked for.

    Examples: [bold]octavo serve[/bold] · [bold]octavo serve ./my-model --port 8080 --max-model-len 4096[/bold]
    """
    started = time.perf_counter()
    from octavo.cluster.serve import ServerOptions, run

    try:
        values = merge(read_yaml(config) if config is not None else {}, settings)
        if model is not None:
            values["model"] = model
        if "api_key" not in values and env.api_key() is not None:
            values["api_key"] = env.api_key()
        deployment = DeploymentConfig.from_mapping(values)
        options = ServerOptions(host, port, address, dashboard, haproxy, grpc_port)
        code = run(deployment, options, started)
    except ConfigError as error:
        sys.stderr.write(f"octavo: {error}\n")
        code = 2
    raise typer.Exit(code)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    sys.stdout.write(f"octavo {installed('octavo')}\n")


app.command()(chat)
app.command()(generate)
app.command()(with_flags(batch, is_for_batches))
app.command()(deploy)
app.command()(undeploy)
app.command()(status)
app.command()(doctor)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
