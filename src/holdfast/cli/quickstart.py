"""`holdfast quickstart`: train, save, kill the server, resume, and compare every bit."""

from __future__ import annotations

import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from holdfast import (
    AdamParams,
    Datum,
    HoldfastError,
    ModelInput,
    SamplingClient,
    SamplingParams,
    ServiceClient,
    TensorData,
    TrainingClient,
)
from holdfast.cli.dates import (
    ANSWER_TOKENS,
    BATCH,
    BETA1,
    BETA2,
    EPS,
    RANK,
    STEPS,
    STOP,
    WEIGHT_DECAY,
    DateTask,
    Example,
    decode,
    encode,
    exact_match,
    learning_rate,
)
from holdfast.cli.output import one_line_errors
from holdfast.cli.server_process import ServerDied, ServerProcess

BASE_MODEL = "holdfast-tiny"
MORE_STEPS = 20
"""Steps after the save: the same ones uninterrupted, resumed and cold."""
HELD_OUT = 50
SHOWN = 3
NAME = "epoch-1-step-{step}-loss-{loss:.2f}"


@dataclass(slots=True)
class Line:
    """One way of going on from the checkpoint."""

    name: str
    losses: list[float] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)
    weights: str = ""
    """blake3 of the adapter's weights at the end."""

    def same_as(self, other: Line) -> bool:
        """Whether every bit agrees."""
        return (
            [struct.pack("<d", loss) for loss in self.losses]
            == [struct.pack("<d", loss) for loss in other.losses]
            and self.logprobs == other.logprobs
            and self.weights == other.weights
        )


@click.command(name="quickstart")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the server's data there; without it, it is removed at the end.",
)
@click.option("--seed", default=0, show_default=True, help="Of the task and the initial weights.")
def command(data_dir: Path | None, seed: int) -> None:
    """See it work: a model learns, the server is killed, the run goes on exactly.

    Starts a server of its own, teaches the shipped model to write dates as ISO 8601, saves, trains
    on, kills the server with SIGKILL, resumes with and without the optimizer's state, and compares.
    Exits with 1 unless the resumed run equals the uninterrupted one in every bit.
    """
    import holdfast.server.serve  # noqa: F401  where it is not installed, say so before all else

    console = Console()
    # The server must not outlive a quickstart that is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with one_line_errors(), ExitStack() as stack:
        if data_dir is None:
            data_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="holdfast-")))
        try:
            server = ServerProcess(data_dir.absolute())
            stack.callback(server.stop)
            exact = _Quickstart(console, server, data_dir, DateTask(seed, HELD_OUT), seed).run()
        except ServerDied as error:
            raise click.ClickException(f"the server did not start:\n{error}") from error
        except HoldfastError as error:
            raise click.ClickException(f"{error.message} ({error.code})") from error
    if not exact:
        raise SystemExit(1)


class _Quickstart:
    def __init__(
        self, console: Console, server: ServerProcess, data_dir: Path, task: DateTask, seed: int
    ) -> None:
        self._console = console
        self._server = server
        self._data_dir = data_dir
        self._task = task
        self._seed = seed

    def run(self) -> bool:
        """The whole story; whether the resumed run is exact."""
        began = time.monotonic()
        seconds = self._server.start()
        self._say(f"server answers after {seconds:.1f} s at {self._server.url}")
        with self._connect() as service:
            client = service.create_lora_training_client(
                BASE_MODEL, rank=RANK, seed=self._seed
            ).result()
            base = service.create_sampling_client(base_model=BASE_MODEL).result()
            before = self._answers(base, "the base model answers")
            loss = self._train(client, range(STEPS), "training")
            name = NAME.format(step=STEPS, loss=loss)
            path = client.save_state(name).result().path
            self._say(f"saved [bold]{path}[/]")
            after = self._answers(
                client.save_weights_and_get_sampling_client().result(), "the tuned model answers"
            )
            uninterrupted = self._go_on(client, "uninterrupted")
            self._server.kill()
            self._say("server killed with SIGKILL")
            seconds = self._server.start()
            self._say(f"server started again over the same data, answers after {seconds:.1f} s")
        with self._connect() as service:
            resumed = self._go_on(
                service.create_training_client_from_state_with_optimizer(path).result(), "resumed"
            )
            cold = self._go_on(service.create_training_client_from_state(path).result(), "cold")
        self._show_answers(before, after)
        self._show_lines([uninterrupted, resumed, cold])
        exact = resumed.same_as(uninterrupted) and not cold.same_as(uninterrupted)
        self._verdict(exact, resumed.same_as(uninterrupted), time.monotonic() - began)
        return exact

    def _connect(self) -> ServiceClient:
        return ServiceClient(base_url=self._server.url, api_key="tml-quickstart")

    def _train(self, client: TrainingClient, steps: range, title: str) -> float:
        loss = 0.0

        def show(step: int, outputs: tuple[float, list[bytes]]) -> str:
            nonlocal loss
            loss = outputs[0]
            return f"loss {loss:.3f}"

        self._steps(client, steps, title, show)
        return loss

    def _go_on(self, client: TrainingClient, name: str) -> Line:
        line = Line(name)

        def keep(step: int, outputs: tuple[float, list[bytes]]) -> str:
            line.losses.append(outputs[0])
            line.logprobs.extend(outputs[1])
            return f"loss {outputs[0]:.3f}"

        self._steps(client, range(STEPS, STEPS + MORE_STEPS), name, keep)
        saved = client.save_state(f"after-{name}").result()
        line.weights = self._digest(saved.path)
        return line

    def _steps(
        self,
        client: TrainingClient,
        steps: range,
        title: str,
        show: Callable[[int, tuple[float, list[bytes]]], str],
    ) -> None:
        with self._progress() as progress:
            bar = progress.add_task(title, total=len(steps), info="")
            for step in steps:
                examples = self._task.batch(step, BATCH)
                tokens = sum(len(example.answer) for example in examples)
                forward = client.forward_backward([_datum(e) for e in examples], "cross_entropy")
                params = AdamParams(
                    learning_rate=learning_rate(step),
                    beta1=BETA1,
                    beta2=BETA2,
                    eps=EPS,
                    weight_decay=WEIGHT_DECAY,
                )
                update = client.optim_step(params)
                output = forward.result()
                update.result()
                logprobs = [
                    struct.pack(f"<{len(values)}f", *values)
                    for values in (o["logprobs"].data for o in output.loss_fn_outputs)
                ]
                info = show(step, (output.metrics["loss:sum"] / tokens, logprobs))
                progress.update(bar, advance=1, info=info)

    def _answers(self, sampler: SamplingClient, title: str) -> list[str]:
        """Greedy answers to the held-out questions."""
        params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, stop=[STOP])
        asked = [
            sampler.sample(ModelInput.from_ints(encode(example.prompt)), 1, params)
            for example in self._task.held_out
        ]
        with self._progress() as progress:
            bar = progress.add_task(title, total=len(asked), info="")
            answers = []
            for future in asked:
                answers.append(decode(future.result().sequences[0].tokens))
                progress.update(bar, advance=1)
        return answers

    def _digest(self, path: str) -> str:
        """The hash of a checkpoint's weights, as its manifest has it."""
        from holdfast.protocol.paths import CheckpointPath
        from holdfast.server.data_dir import existing_store
        from holdfast.store import NameKey

        parsed = CheckpointPath.parse(path)
        store = existing_store(self._data_dir, None)
        try:
            manifest_id = store.resolve(NameKey(parsed.run_id, parsed.kind, parsed.name))
            assert manifest_id is not None
            return store.read_manifest(manifest_id).files["adapter_model.safetensors"].hash
        finally:
            store.close()

    # --- What is shown -----------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self._console.print(f"[dim]•[/] {text}", highlight=False, soft_wrap=True)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("[dim]•[/] {task.description:<24}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[info]}"),
            console=self._console,
        )

    def _show_answers(self, before: Sequence[str], after: Sequence[str]) -> None:
        held_out = self._task.held_out
        table = Table(title="Held-out dates", title_justify="left")
        for column in ("question", "before", "after", "right"):
            table.add_column(column)
        for example, old, new in list(zip(held_out, before, after, strict=True))[:SHOWN]:
            table.add_row(*map(_plain, (example.prompt.split("\n")[0], old, new, example.answer)))
        shares = [f"{exact_match(held_out, answers):.0%}" for answers in (before, after)]
        table.add_section()
        table.add_row(f"exact, of {len(held_out)}", *shares, "", style="bold")
        self._console.print(table)

    def _show_lines(self, lines: Sequence[Line]) -> None:
        marks = (0, 1, 4, MORE_STEPS - 1)
        table = Table(title="Losses going on from the checkpoint", title_justify="left")
        table.add_column("run", no_wrap=True)
        for mark in marks:
            table.add_column(f"step {STEPS + mark + 1}", justify="right", no_wrap=True)
        table.add_column("weights", no_wrap=True)
        for line in lines:
            losses = (f"{line.losses[mark]:.7f}" for mark in marks)
            table.add_row(line.name, *losses, line.weights[:12])
        self._console.print(table)

    def _verdict(self, exact: bool, same: bool, seconds: float) -> None:
        if exact:
            text = "[bold green]resumed == uninterrupted, in every bit; cold differs[/]"
        elif same:
            text = "[bold red]the cold run equals the uninterrupted one: nothing was shown[/]"
        else:
            text = "[bold red]resumed differs from uninterrupted[/]"
        self._console.print(f"{text}  ({seconds:.0f} s)", highlight=False)


def _datum(example: Example) -> Datum:
    tokens, targets, weights = example.tokens()
    return Datum(
        model_input=ModelInput.from_ints(tokens),
        loss_fn_inputs={
            "target_tokens": TensorData(targets, "int64"),
            "weights": TensorData(weights, "float32"),
        },
    )


def _plain(text: str) -> str:
    return text.strip().replace("[", r"\[")
