"""`holdfast checkpoint`: the commands that work on the files of a data directory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import click

from holdfast.cli.durations import Duration
from holdfast.cli.offline import offline_errors, open_data_store
from holdfast.cli.online import PathType
from holdfast.cli.options import catalog, data_dir, store
from holdfast.cli.output import (
    as_json,
    bytes_progress,
    count,
    print_json,
    say,
    size,
    working,
)
from holdfast.protocol.paths import CheckpointPath, check_user_name

if TYPE_CHECKING:
    from holdfast.server.adapters import BaseModel
    from holdfast.store import Store, StoreError, VerifyReport


@click.command()
@click.argument("path", type=PathType(), nargs=-1)
@click.option("--all", "every", is_flag=True, help="Everything in the store.")
@data_dir
@store
@as_json
def verify(
    path: tuple[CheckpointPath, ...],
    every: bool,
    data_dir: Path,
    store: str | None,
    as_json: bool,
) -> None:
    """Read every byte of checkpoints and compare it with its hash.

    Works while a server runs. Exits with 1 when anything is damaged.
    """
    if bool(path) == every:
        raise click.UsageError("name one or more PATHs, or everything with --all")
    with offline_errors(), open_data_store(data_dir, store) as opened:
        checked, problems = _verify_all(opened) if every else _verify_each(opened, path)
    if as_json:
        print_json({"ok": not problems, "checked": checked, "problems": problems})
    else:
        what = f"{count(checked['manifests'], 'manifest')}, {count(checked['blobs'], 'blob')}"
        say(
            f"{what}, {size(checked['bytes'])} read: "
            + (count(len(problems), "problem") if problems else "all whole")
        )
        for problem in problems:
            say(f"Error: {problem['message']}")
    if problems:
        raise SystemExit(1)


Problems = list[dict[str, str | None]]
"""As `--json` shows them; `path` is null where everything was asked for."""


def _verify_all(store: Store) -> tuple[dict[str, int], Problems]:
    with bytes_progress("verifying", None) as show:
        report = store.verify(progress=show)
    return _checked(report), [_problem(error) for error in report.problems]


def _verify_each(
    store: Store, paths: tuple[CheckpointPath, ...]
) -> tuple[dict[str, int], Problems]:
    """What is wrong with one does not keep the others from being read."""
    from holdfast.store import StoreError

    checked = {"manifests": 0, "blobs": 0, "bytes": 0}
    problems: Problems = []
    found = {}
    for path in paths:
        try:
            manifest_id = _find(store, path)
            found[path] = (manifest_id, store.read_manifest(manifest_id).size)
        except StoreError as error:
            problems.append(_problem(error, path))
    with bytes_progress("verifying", sum(size for _, size in found.values())) as show:
        for path, (manifest_id, _) in found.items():
            advance = _after(checked["bytes"], show)
            try:
                report = store.verify(manifest_id, progress=advance)
            except StoreError as error:
                problems.append(_problem(error, path))
                continue
            for what, number in _checked(report).items():
                checked[what] += number
            problems += [_problem(error, path) for error in report.problems]
    return checked, problems


def _after(before: int, show: Callable[[int], object]) -> Callable[[int, int], object]:
    return lambda done, _: show(before + done)


def _checked(report: VerifyReport) -> dict[str, int]:
    return {"manifests": report.manifests, "blobs": report.blobs, "bytes": report.size}


def _problem(error: StoreError, path: CheckpointPath | None = None) -> dict[str, str | None]:
    text = str(error)
    if path is not None and f"{path.run_id}/{path.kind}/{path.name}" not in text:
        text = f"{path}: {text}"
    return {"code": error.code, "message": text, "path": None if path is None else str(path)}


@click.command()
@click.argument("path", type=PathType())
@click.argument("target", type=click.Path(path_type=Path), required=False)
@data_dir
@store
@as_json
def export(
    path: CheckpointPath,
    target: Path | None,
    data_dir: Path,
    store: str | None,
    as_json: bool,
) -> None:
    """Write a checkpoint to a file or a directory.

    A TARGET that ends in .tar becomes an archive, any other one a directory, which is a PEFT
    adapter. Without TARGET it is an archive, ./NAME.tar. Both can be brought in again with
    `import`. Works while a server runs.
    """
    from holdfast.store import Archive

    target = Path(f"{path.name}.tar") if target is None else target
    if target.exists() or target.is_symlink():
        raise click.ClickException(f"{target} exists; name another target, or remove it")
    with (
        offline_errors(),
        open_data_store(data_dir, store) as opened,
        _naming(path),
        opened.pin(_find(opened, path)) as manifest,
    ):
        if target.suffix == ".tar":
            archive = Archive(opened, manifest)
            with _appearing(target) as temporary:
                _write(temporary, archive.read(), archive.size, target.name)
        else:
            from holdfast.store.archive import MANIFEST

            with _appearing(target) as temporary:
                temporary.mkdir()
                for name, blob in manifest.files.items():
                    pieces = opened.stream_blob(blob, what=f"{name} of {manifest.label}")
                    _write(temporary / name, pieces, blob.size, name)
                document = manifest.to_bytes()
                _write(temporary / MANIFEST, iter([document]), len(document), MANIFEST)
    if as_json:
        print_json(
            {"path": str(path), "target": str(target.absolute()), "size_bytes": manifest.size}
        )
    else:
        say(f"{path} is in {target} ({size(manifest.size)})")


@contextmanager
def _naming(path: CheckpointPath) -> Iterator[None]:
    """Say of which checkpoint something is damaged."""
    from holdfast.store import StoreError

    try:
        yield
    except StoreError as error:
        raise click.ClickException(str(_problem(error, path)["message"])) from error


def _write(path: Path, pieces: Iterator[bytes], total: int, title: str) -> None:
    from holdfast.store.files import LocalFiles

    done = 0
    with (
        closing(LocalFiles().create(str(path))) as file,
        bytes_progress(title, total) as show,
    ):
        for piece in pieces:
            file.write(piece)
            done += len(piece)
            show(done)
        file.sync()


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A place beside `target`; what is written there appears there at once, and durably.

    Files must have been synced.
    """
    import shutil

    from holdfast.store.files import LocalFiles

    temporary = target.with_name(f".{target.name}.{uuid4().hex[:8]}")
    try:
        yield temporary
        if temporary.is_dir():
            LocalFiles().sync_dir(str(temporary))
        temporary.rename(target)
        LocalFiles().sync_dir(str(target.parent))
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _base_option(
    _ctx: click.Context, _param: click.Parameter, value: str | None
) -> tuple[str, Path] | None:
    if value is None:
        return None
    name, equals, directory = value.partition("=")
    if not name or not equals or not directory:
        raise click.BadParameter(f"{value!r} is not NAME=DIR, for example tiny=./models/tiny")
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise click.BadParameter(f"there is no directory {directory}")
    return name, path


@click.command(name="import")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--name", help="The checkpoint's name; without it, the one it had, or `imported`.")
@click.option("--owner", help="Whom it belongs to, on a server with API keys.")
@click.option("--ttl", type=Duration(), help="Let it expire after this time, e.g. 7d.")
@click.option(
    "--base-model",
    "base",
    metavar="NAME=DIR",
    callback=_base_option,
    help="The base model of a PEFT adapter: the name that the server serves it by, and its files.",
)
@data_dir
@store
@catalog
@as_json
def import_(
    source: Path,
    name: str | None,
    owner: str | None,
    ttl: int | None,
    base: tuple[str, Path] | None,
    data_dir: Path,
    store: str | None,
    catalog: str | None,
    as_json: bool,
) -> None:
    """Bring a checkpoint in from SOURCE, as a run of its own.

    SOURCE is an archive that `export` or the server made, a directory that `download` made, or a
    PEFT adapter (adapter_model.safetensors and adapter_config.json) as a directory or tar. An
    adapter needs --base-model. Works while a server runs; prints the path to train or sample from.
    """
    from holdfast.runs.checkpoints import Checkpoints, check_ttl
    from holdfast.runs.copies import adopt
    from holdfast.server.data_dir import existing
    from holdfast.server.importing import Wishes, import_checkpoint, size_of

    with offline_errors():
        if name is not None:
            check_user_name(name)
        check_ttl(ttl)
        source = source.resolve()
        with existing(data_dir.expanduser().absolute(), store, catalog) as opened:
            from holdfast.server.auth import Keys

            wishes = Wishes(_owner(Keys(opened.catalog), owner), name, ttl)
            with bytes_progress(source.name, size_of(source)) as show:
                manifest = import_checkpoint(
                    opened.store, source, wishes, _base_model(base), progress=show
                )
            asyncio.run(adopt(Checkpoints(opened.store, opened.catalog), opened.catalog, manifest))
    path = f"tinker://{manifest.key}"
    if as_json:
        print_json(
            {
                "path": path,
                "type": manifest.kind,
                "base_model": manifest.base_model,
                "step": manifest.step,
                "size_bytes": manifest.size,
            }
        )
        return
    click.echo(path)
    if manifest.kind == "sampler":
        say("it adapts some layers of their kind only: it can be sampled from, not trained")


def _base_model(base: tuple[str, Path] | None) -> BaseModel | None:
    from holdfast.server.adapters import BaseModel

    if base is None:
        return None
    with working(f"hashing the files of {base[0]}"):
        return BaseModel.read(*base)


def _owner(keys: object, wanted: str | None) -> str:
    from holdfast.server.auth import LOCAL_OWNER, Keys

    assert isinstance(keys, Keys)
    owners = sorted({key.owner for key in keys.all()}) or [LOCAL_OWNER]
    if wanted is None and len(owners) == 1:
        return owners[0]
    if wanted is None:
        raise click.UsageError(f"name the owner with --owner: one of {', '.join(owners)}")
    if wanted not in owners:
        raise click.BadParameter(
            f"{wanted!r} has no key here; owners are {', '.join(owners)}", param_hint="--owner"
        )
    return wanted


def _find(store: Store, path: CheckpointPath) -> str:
    """The id of a checkpoint's manifest. Raises MissingName."""
    from holdfast.store import MissingName, NameKey

    manifest_id = store.resolve(NameKey(path.run_id, path.kind, path.name))
    if manifest_id is None:
        raise MissingName(f"there is no checkpoint {path} here")
    return manifest_id
