"""import: what comes in is whole, says what it is, and everything else is refused."""

from __future__ import annotations

import asyncio
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from holdfast.catalog import Catalog
from holdfast.engine.revision import revision
from holdfast.server.auth import Keys
from holdfast.server.importing import Wishes, import_checkpoint
from holdfast.store import InvalidFile, LocalStore, Manifest, Store
from tests.cli.samples import (
    HEAD,
    LAYERS,
    RANK,
    adapter_config,
    adapter_files,
    adapter_weights,
    add_checkpoint,
    fails,
    holdfast,
    optimizer_file,
    write_base,
    write_directory,
)
from tests.store.samples import CONFIG, OPTIMIZER, WEIGHTS
from tests.support.server import key_of

Files = dict[str, bytes]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def imported(store: Store, *args: object) -> Manifest:
    result = holdfast("checkpoint", "import", *args)
    assert result.exit_code == 0, result.output
    found = store.resolve(key_of(result.stdout.strip()))
    assert found is not None
    return store.read_manifest(found)


def exported(store: Store, target: Path, **changes: Any) -> Manifest:
    manifest = add_checkpoint(store, **changes)
    assert holdfast("checkpoint", "export", f"tinker://{manifest.key}", target).exit_code == 0
    return manifest


# --- What works ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["a.tar", "directory"])
def test_an_export_comes_back_as_another_run(store: Store, tmp_path: Path, target: str) -> None:
    manifest = exported(
        store, tmp_path / target, user_metadata={"a": "b"}, public=True, expires=4e9
    )
    back = imported(store, tmp_path / target)
    assert dict(back.files) == dict(manifest.files)
    assert back.run != manifest.run
    assert (back.name, back.kind, back.step) == (manifest.name, "training", manifest.step)
    assert (back.base_model, back.base_revision) == (manifest.base_model, manifest.base_revision)
    assert (back.user_metadata, back.parent) == ({"a": "b"}, manifest.id)
    assert (back.public, back.expires) == (False, None)


def test_an_import_is_listed_at_once(store: Store, tmp_path: Path) -> None:
    exported(store, tmp_path / "a.tar")
    back = imported(store, tmp_path / "a.tar", "--name", "new", "--ttl", "7d")
    assert back.expires == pytest.approx(back.created + 7 * 86400)
    assert back.name == "new"
    document = json.loads(holdfast("doctor", "--json").stdout)
    # The original was put there behind the catalog's back; the import was not.
    assert all(back.run not in problem["message"] for problem in document["problems"])


@pytest.mark.parametrize("form", ["directory", "tar"])
def test_an_adapter_of_another_program_is_taken(
    store: Store, tmp_path: Path, base: Path, form: str
) -> None:
    source = write_directory(tmp_path / "peft", {**adapter_files(), "README.md": b"# mine"})
    if form == "tar":
        with tarfile.open(tmp_path / "peft.tar", "w") as tar:
            tar.add(source, arcname="peft")
        source = tmp_path / "peft.tar"
    back = imported(store, source, "--base-model", f"served/name={base}")
    assert (back.kind, back.name) == ("training", "imported")
    assert (back.base_model, back.base_revision) == ("served/name", revision(base))
    assert set(back.files) == {WEIGHTS, CONFIG}
    assert store.read_blob(back.files[WEIGHTS], what="it") == adapter_files()[WEIGHTS]
    lora = back.lora
    assert (lora.rank, lora.alpha) == (RANK, 32.0)
    assert (lora.train_attn, lora.train_mlp, lora.train_unembed) == (True, True, False)


def test_the_revision_is_of_the_files(store: Store, tmp_path: Path, base: Path) -> None:
    other = write_base(tmp_path / "other", scale=2.0)
    source = write_directory(tmp_path / "peft", adapter_files())
    one = imported(store, source, "--base-model", f"m={base}")
    two = imported(store, source, "--base-model", f"m={other}")
    assert one.base_revision != two.base_revision


@pytest.mark.parametrize(
    ("layers", "kind"),
    [
        (LAYERS, "training"),
        ({**LAYERS, **HEAD}, "training"),
        ({k: v for k, v in LAYERS.items() if "self_attn" in k}, "training"),
        ({k: v for k, v in LAYERS.items() if "q_proj" in k}, "sampler"),
        ({k: v for k, v in LAYERS.items() if "down_proj" not in k}, "sampler"),
    ],
)
def test_an_adapter_of_some_layers_can_only_be_sampled_from(
    store: Store, tmp_path: Path, base: Path, layers: dict[str, tuple[int, int]], kind: str
) -> None:
    source = write_directory(tmp_path / "peft", adapter_files(layers))
    back = imported(store, source, "--base-model", f"m={base}")
    assert back.kind == kind
    assert back.lora.train_unembed is ("lm_head" in layers)


def test_on_a_server_with_keys_somebody_owns_it(
    store: Store, data_dir: Path, tmp_path: Path
) -> None:
    exported(store, tmp_path / "a.tar")

    def add_key(owner: str) -> None:
        catalog = Catalog.open_file(data_dir / "catalog.db")
        asyncio.run(Keys(catalog).create(owner))
        catalog.close()

    add_key("ann")
    assert imported(store, tmp_path / "a.tar").owner == "ann"
    add_key("bob")
    assert "ann, bob" in fails("checkpoint", "import", tmp_path / "a.tar", status=2)
    strange = fails("checkpoint", "import", tmp_path / "a.tar", "--owner", "eve", status=2)
    assert "'eve'" in strange
    assert imported(store, tmp_path / "a.tar", "--owner", "bob").owner == "bob"


# --- What is refused -------------------------------------------------------------------------


def weights(**changes: Any) -> bytes:
    return save({**adapter_weights(), **changes})


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ONE = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}
ZEROS = np.zeros((2, 2), np.float32)

HOSTILE_ADAPTERS: dict[str, tuple[Files, str]] = {
    "no weights": ({CONFIG: adapter_config()}, WEIGHTS),
    "no configuration": ({WEIGHTS: weights()}, CONFIG),
    "pickle": ({"adapter_model.bin": b"\x80\x04", CONFIG: adapter_config()}, "may run code"),
    "not safetensors": ({**adapter_files(), WEIGHTS: b"nonsense"}, WEIGHTS),
    "empty": ({**adapter_files(), WEIGHTS: b""}, WEIGHTS),
    "huge header": ({**adapter_files(), WEIGHTS: (1 << 62).to_bytes(8, "little")}, "header"),
    "cut short": ({**adapter_files(), WEIGHTS: weights()[:-1]}, WEIGHTS),
    "data behind": ({**adapter_files(), WEIGHTS: weights() + b"x"}, WEIGHTS),
    "duplicate tensor": (
        {
            **adapter_files(),
            WEIGHTS: raw(
                b'{"%s": %s, "%s": %s}'
                % (A.encode(), json.dumps(ONE).encode(), A.encode(), json.dumps(ONE).encode()),
                bytes(8),
            ),
        },
        "twice",
    ),
    "overlap": (
        {**adapter_files(), WEIGHTS: raw({A: ONE, A.replace("_A", "_B"): ONE}, bytes(8))},
        "overlaps",
    ),
    "deep JSON": ({**adapter_files(), WEIGHTS: raw(b"[" * 100_000 + b"]" * 100_000)}, WEIGHTS),
    "strange tensor": ({**adapter_files(), WEIGHTS: weights(other=ZEROS)}, "'other'"),
    "an embedding": (
        {
            **adapter_files(),
            WEIGHTS: save(adapter_weights({"model.embed_tokens": (16, 8)})),
        },
        "neither attention nor MLP",
    ),
    "no pair": ({**adapter_files(), WEIGHTS: save({A: ZEROS})}, "lora_A and lora_B"),
    "another rank": (
        {**adapter_files(), CONFIG: adapter_config(r=4)},
        "do not fit the rank 4",
    ),
    "integers": (
        {**adapter_files(), WEIGHTS: weights(**{A: np.zeros((RANK, 8), np.int32)})},
        "I32",
    ),
    "another layer": (
        {
            **adapter_files(),
            WEIGHTS: save(adapter_weights({"model.layers.7.self_attn.q_proj": (8, 8)})),
        },
        "does not have",
    ),
    "another shape": (
        {
            **adapter_files(),
            WEIGHTS: save(adapter_weights({"model.layers.0.self_attn.q_proj": (8, 9)})),
        },
        "8 x 9",
    ),
    "configuration is no JSON": ({**adapter_files(), CONFIG: b"{"}, CONFIG),
    "configuration is a list": ({**adapter_files(), CONFIG: b"[]"}, CONFIG),
    "configuration is huge": ({**adapter_files(), CONFIG: b" " * (2 << 20)}, CONFIG),
    "duplicate keys": ({**adapter_files(), CONFIG: b'{"r": 2, "r": 4}'}, "twice"),
    "rank is text": ({**adapter_files(), CONFIG: adapter_config(r="2")}, "r is 2"),
    "rank is zero": ({**adapter_files(), CONFIG: adapter_config(r=0)}, "r is 0"),
    "alpha is huge": ({**adapter_files(), CONFIG: adapter_config(lora_alpha=10**400)}, "alpha"),
    "alpha is null": ({**adapter_files(), CONFIG: adapter_config(lora_alpha=None)}, "alpha"),
    "DoRA": ({**adapter_files(), CONFIG: adapter_config(use_dora=True)}, "use_dora"),
    "patterns": ({**adapter_files(), CONFIG: adapter_config(rank_pattern={"q": 4})}, "rank_p"),
    "biases": ({**adapter_files(), CONFIG: adapter_config(bias="all")}, "bias is 'all'"),
    "another method": ({**adapter_files(), CONFIG: adapter_config(peft_type="IA3")}, "IA3"),
}


@pytest.mark.parametrize("case", HOSTILE_ADAPTERS)
def test_an_adapter_that_does_not_hold_together_is_refused(
    store: Store, tmp_path: Path, base: Path, case: str
) -> None:
    files, message = HOSTILE_ADAPTERS[case]
    source = write_directory(tmp_path / "peft", files)
    assert message in fails("checkpoint", "import", source, "--base-model", f"m={base}")
    assert list(store.names()) == []
    assert list(store.unnamed()) == []


def change_manifest(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "holdfast.json"
        document = {**json.loads(path.read_bytes()), **changes}
        path.write_bytes(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())

    return change


def replace(name: str, data: bytes | None) -> Callable[[Path], None]:
    """Replace a file, and say so in the manifest: its hashes then fit."""

    def change(directory: Path) -> None:
        from blake3 import blake3

        path = directory / "holdfast.json"
        document = json.loads(path.read_bytes())
        if data is None:
            (directory / name).unlink()
            del document["files"][name]
        else:
            (directory / name).write_bytes(data)
            document["files"][name] = {"hash": blake3(data).hexdigest(), "size": len(data)}
        path.write_bytes(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())

    return change


def link(name: str, target: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).rename(directory / "real")
        (directory / name).symlink_to(target)

    return change


def fifo(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return change


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).write_bytes(data)

    return change


LORA = {
    "rank": RANK, "alpha": 32.0, "seed": 1,
    "train_attn": True, "train_mlp": True, "train_unembed": False,
}  # fmt: skip

HOSTILE_CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "another file": (write(WEIGHTS, weights(**{A: np.ones((RANK, 8), np.float32)})), WEIGHTS),
    "a missing file": (lambda d: (d / OPTIMIZER).unlink(), OPTIMIZER),
    "a link": (link(WEIGHTS, "real"), "symbolic link"),
    "a link outside": (link(CONFIG, "/etc/passwd"), "symbolic link"),
    "a linked manifest": (link("holdfast.json", "real"), "symbolic link"),
    "a pipe": (fifo(WEIGHTS), "not a plain file"),
    "another rank": (change_manifest(lora={**LORA, "rank": 4}), "disagree on the rank"),
    "another alpha": (change_manifest(lora={**LORA, "alpha": 16.0}), "disagree on the alpha"),
    "other layers": (change_manifest(lora={**LORA, "train_mlp": False}), "train_mlp"),
    "no optimizer": (change_manifest(optimizer=None), "optimizer is None"),
    "another optimizer": (change_manifest(optimizer="sgd"), "disagree on optimizer"),
    "another step": (change_manifest(step=4), "disagree on optimizer and step"),
    "a path": (change_manifest(name="../x"), "name"),
    "a newer format": (change_manifest(format_version=99), "format version 99"),
    "unknown keys": (change_manifest(more=1), "holdfast.json"),
    "no manifest": (write("holdfast.json", b"{}"), "holdfast.json"),
    "a huge manifest": (write("holdfast.json", b" " * (2 << 20)), "too many"),
    "files elsewhere": (
        change_manifest(files={"../../x": {"hash": "0" * 64, "size": 1}}),
        "not a plain file name",
    ),
    "a file too many": (replace("more.txt", b"x"), "more.txt"),
    "weights of nonsense": (replace(WEIGHTS, raw({"x": ONE}, bytes(8))), "'x'"),
    "an optimizer of nonsense": (replace(OPTIMIZER, b"nonsense"), OPTIMIZER),
    "an optimizer of another": (
        replace(OPTIMIZER, optimizer_file(step=7)),
        "disagree on optimizer and step",
    ),
    "no weights": (replace(WEIGHTS, None), f"no {WEIGHTS}"),
    "another base": (
        replace(
            WEIGHTS,
            save(
                adapter_weights(),
                metadata={"holdfast": json.dumps({"base_model": "x", "base_revision": "y"})},
            ),
        ),
        "disagree on the base model",
    ),
}


@pytest.mark.parametrize("form", ["directory", "tar"])
@pytest.mark.parametrize("case", HOSTILE_CHECKPOINTS)
def test_a_checkpoint_that_does_not_hold_together_is_refused(
    store: Store, tmp_path: Path, case: str, form: str
) -> None:
    change, message = HOSTILE_CHECKPOINTS[case]
    source = tmp_path / "exported"
    exported(store, source)
    before = list(store.names())
    change(source)
    if form == "tar":
        with tarfile.open(tmp_path / "exported.tar", "w") as tar:
            for path in sorted(source.iterdir()):
                if path.name != "real":
                    tar.add(path, arcname=path.name)
        source = tmp_path / "exported.tar"
    error = fails("checkpoint", "import", source)
    if form == "directory":
        assert message in error
    assert list(store.names()) == before


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["no-such-file"], 2, "does not exist"),
        (["PEFT"], 1, "--base-model NAME=DIR"),
        (["PEFT", "--base-model", "x"], 2, "is not NAME=DIR"),
        (["PEFT", "--base-model", "x=/no/such"], 2, "there is no directory /no/such"),
        (["PEFT", "--base-model", "x=PEFT"], 1, "no config.json"),
        (["TAR", "--base-model", "x=BASE"], 1, "leave --base-model out"),
        (["TAR", "--name", "a/b"], 1, "'a/b'"),
        (["TAR", "--name", "auto.1"], 1, "reserved"),
        (["TAR", "--ttl", "5m"], 1, "one hour"),
        (["BASE"], 1, "adapter"),
        (["/dev/null"], 1, "not a plain file"),
    ],
)
def test_mistakes_of_import(
    store: Store, tmp_path: Path, base: Path, args: list[str], status: int, message: str
) -> None:
    places = {"PEFT": write_directory(tmp_path / "peft", adapter_files()), "BASE": base}
    exported(store, tmp_path / "a.tar")
    places["TAR"] = tmp_path / "a.tar"
    for name, place in places.items():
        args = [arg.replace(name, str(place)) for arg in args]
    if args == [str(base)]:
        args += ["--base-model", f"m={base}"]
    assert message in fails("checkpoint", "import", *args, status=status)


def test_a_compressed_archive_is_refused(store: Store, tmp_path: Path) -> None:
    exported(store, tmp_path / "d")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "d", arcname=".")
    assert "not a tar archive" in fails("checkpoint", "import", tmp_path / "a.tar.gz")


# --- Fuzz ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, bytes, Path]:
    """A store, the archive of a checkpoint, and room to import from."""
    root = tmp_path_factory.mktemp("fuzz")
    store = LocalStore(root / "data" / "store")
    manifest = add_checkpoint(store)
    target = root / "a.tar"
    done = holdfast(
        "checkpoint", "export", f"tinker://{manifest.key}", target, "--data-dir", root / "data"
    )
    assert done.exit_code == 0, done.output
    return store, target.read_bytes(), root


Edit = tuple[int, bytes]


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=12)), max_size=3
    ),
    cut=st.none() | st.integers(0, 1 << 20),
    insert=st.none() | st.tuples(st.integers(0, 1 << 20), st.binary(max_size=600)),
)
def test_no_changed_archive_is_taken_for_a_checkpoint(
    seed: tuple[Store, bytes, Path],
    edits: list[Edit],
    cut: int | None,
    insert: tuple[int, bytes] | None,
) -> None:
    """Whatever is changed: refused by name, or nothing that matters was (a time in a header)."""
    store, archive, root = seed
    data = bytearray(archive)
    for at, new in edits:
        at %= len(data)
        data[at : at + len(new)] = new
    if insert is not None:
        at = insert[0] % len(data)
        data[at:at] = insert[1]
    if cut is not None:
        del data[cut % len(data) :]
    source = root / "changed.tar"
    source.write_bytes(data)
    try:
        manifest = import_checkpoint(store, source, Wishes("local"), None)
    except InvalidFile as error:
        assert str(error)
    else:
        whole = import_checkpoint(store, root / "a.tar", Wishes("local"), None)
        assert dict(manifest.files) == dict(whole.files)
        assert manifest.parent == whole.parent


def random_member(draw: st.DrawFn) -> tuple[tarfile.TarInfo, bytes]:
    names = [WEIGHTS, CONFIG, OPTIMIZER, "holdfast.json", "../x", "/etc/x", "a/b/c", ".", "", "é"]
    info = tarfile.TarInfo(draw(st.sampled_from(names)))
    kinds = [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE]
    info.type = draw(st.sampled_from(kinds))
    info.linkname = draw(st.sampled_from(["", WEIGHTS, "/etc/passwd", "../../x"]))
    data = draw(st.sampled_from([*adapter_files().values(), optimizer_file(), b"", b"{}", b"x"]))
    info.size = len(data) if info.type == tarfile.REGTYPE else 0
    return info, data


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    buffer = io.BytesIO()
    form = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for _ in range(draw(st.integers(0, 5))):
            info, data = random_member(draw)
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return buffer.getvalue()


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=archives())
def test_hostile_members_are_refused_by_name(seed: tuple[Store, bytes, Path], data: bytes) -> None:
    store, _, root = seed
    source = root / "hostile.tar"
    source.write_bytes(data)
    before = {p for p in root.rglob("*") if "store" not in p.parts}
    with pytest.raises(InvalidFile):  # at best an adapter without a base model
        import_checkpoint(store, source, Wishes("local"), None)
    assert {p for p in root.rglob("*") if "store" not in p.parts} == before


def test_the_fuzz_would_notice(seed: tuple[Store, bytes, Path]) -> None:
    """The unchanged archive is taken, so that a refusal above is the change's doing."""
    store, archive, root = seed
    source = root / "same.tar"
    source.write_bytes(archive)
    manifest = import_checkpoint(store, source, Wishes("local"), None)
    assert load(store.read_blob(manifest.files[WEIGHTS], what="it")).keys() == set(
        adapter_weights()
    )
