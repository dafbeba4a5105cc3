"""`holdfast serve`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from holdfast.cli.durations import Duration
from holdfast.cli.options import catalog, data_dir, read_config, store


class DeviceType(click.ParamType[str]):
    """A device's name. Whether there is such a device, the engine knows."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            self.fail(f"{value!r} is not cpu, cuda, cuda:N or auto", param, ctx)
        return value


@click.command(name="serve", context_settings={"auto_envvar_prefix": "HOLDFAST"})
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=read_config,
    envvar="HOLDFAST_CONFIG",
    help="A TOML file with any of these options, e.g. port = 9000.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 takes any free one.",
)
@data_dir
@store
@catalog
@click.option(
    "--model",
    "model",
    multiple=True,
    metavar="NAME=PATH_OR_HUB_ID[,tokenizer=HUB_ID]",
    help="A base model to serve; may be repeated. The shipped one is there in any case.",
)
@click.option(
    "--threads",
    type=click.IntRange(0, 1024),
    default=0,
    show_default="as many as suit the model",
    help="Compute threads of a worker. A part of the numerics: change it only between runs.",
)
@click.option(
    "--token-budget",
    type=click.IntRange(16, 1 << 24),
    default=4096,
    show_default=True,
    help="Tokens put through a model at once: bounds the memory, and is a part of the numerics.",
)
@click.option(
    "--device",
    type=DeviceType(),
    default="auto",
    metavar="DEVICE",
    show_default=True,
    help="cpu, cuda, cuda:1, … or auto.",
)
@click.option(
    "--adapter-memory",
    type=click.IntRange(1, 1 << 30),
    default=4096,
    show_default=True,
    metavar="MIB",
    help="Memory for the states of idle runs; those used longest ago are read back when needed.",
)
@click.option(
    "--worker-memory",
    type=click.IntRange(0, 1 << 30),
    default=0,
    show_default="never",
    metavar="MIB",
    help="Resident memory above which a worker is replaced, in good order: no step is lost.",
)
@click.option(
    "--session-grace",
    type=Duration("1m", "1y", "clients send a heartbeat every 10 s, and repeat none that is lost"),
    default="30m",
    metavar="TIME",
    show_default=True,
    help="A session without heartbeat, submission or poll for so long ends, and its runs with it.",
)
@click.option(
    "--results-kept",
    type=Duration("2m", "1y", "a client whose answer was lost may take a minute to ask again"),
    default="10m",
    metavar="TIME",
    show_default=True,
    help="How long results are kept after they were read.",
)
@click.option(
    "--last-state-kept",
    type=Duration("1h", "10y"),
    default="7d",
    metavar="TIME",
    show_default=True,
    help="How long the last state of a run that has ended can be resumed.",
)
@click.option(
    "--stop-within",
    type=Duration("1s", "1h"),
    default="20s",
    metavar="TIME",
    show_default=True,
    help="How long a stop takes at most; what is not done by then the next start recovers.",
)
def command(
    host: str,
    port: int,
    data_dir: Path,
    store: str | None,
    catalog: str | None,
    model: tuple[str, ...],
    threads: int,
    token_budget: int,
    device: str,
    adapter_memory: int,
    worker_memory: int,
    session_grace: int,
    results_kept: int,
    last_state_kept: int,
    stop_within: int,
) -> None:
    """Serve training over HTTP.

    Every option can be given as an environment variable, such as HOLDFAST_PORT. A TIME is a number
    of seconds, or one with a unit: 90s, 30m, 12h, 7d.
    """
    from holdfast.runs.service import Lifetimes
    from holdfast.server.data_dir import CannotUse
    from holdfast.server.serve import serve
    from holdfast.server.settings import Settings, parse_model, shipped_model

    models = {}
    for text in model:
        try:
            name, source = parse_model(text)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--model") from error
        if name in models:
            raise click.BadParameter(f"{name!r} is given twice", param_hint="--model")
        models[name] = source
    shipped_name, shipped = shipped_model()
    models.setdefault(shipped_name, shipped)
    try:
        serve(
            Settings(
                data_dir=data_dir.expanduser().absolute(),
                store=store,
                catalog=catalog,
                host=host,
                port=port,
                models=models,
                threads=threads,
                token_budget=token_budget,
                device=device,
                adapter_memory=adapter_memory << 20,
                worker_memory=worker_memory << 20,
                stop_within=stop_within,
                lifetimes=Lifetimes(
                    session_grace=session_grace,
                    results_kept=results_kept,
                    last_state_kept=last_state_kept,
                ),
            )
        )
    except CannotUse as error:
        raise click.ClickException(str(error)) from error
