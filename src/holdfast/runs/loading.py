"""What a load reads, whether it fits, and what it leaves behind: no state is touched here."""

from __future__ import annotations

import dataclasses

from holdfast.engine.interface import (
    OPTIMIZER_STATE,
    BaseModelInfo,
    Captured,
    RunConfig,
    StateInfo,
)
from holdfast.runs import bodies, journal
from holdfast.runs.bodies import CreateFromState, Load
from holdfast.runs.errors import RunError
from holdfast.runs.order import Entry
from holdfast.runs.run import Run
from holdfast.store import Manifest, NameKey


async def resolve(run: Run, entry: Entry, body: Load | CreateFromState) -> tuple[str, Manifest]:
    """The manifest that a load reads, with its id: fixed by the load's first execution."""
    checkpoints = run.services.checkpoints
    record = await run.read_patiently(lambda c: journal.record(c, run.key, entry.seq))
    if record.target is not None:
        return record.target, await checkpoints.manifest(record.target)
    if body.segment != "weights":
        raise RunError(
            "not_a_training_checkpoint",
            f"'tinker://{body.key}' holds weights for sampling only; training continues from a "
            "path with /weights/, as save_state gives it",
        )
    return await checkpoints.resolve(body.key, body.readers)


def check(run: Run, manifest: Manifest, body: Load | CreateFromState) -> RunConfig:
    """The configuration that a checkpoint is loaded into. RunError unless it fits."""
    if body.optimizer and OPTIMIZER_STATE not in manifest.files:
        raise RunError(
            "no_optimizer_state",
            f"'tinker://{body.key}' has no optimizer state; load it without optimizer",
        )
    config = run.info.config
    if isinstance(body, CreateFromState):
        config = bodies.config_of(manifest)
        if body.base_model is not None:
            config = dataclasses.replace(config, base_model=body.base_model)
        if body.optimizer_type is not None:
            config = dataclasses.replace(config, optimizer=body.optimizer_type)
    assert config is not None
    _check_fit(body.key, manifest, config, optimizer=body.optimizer)
    return config


def check_revision(key: NameKey, manifest: Manifest, info: BaseModelInfo) -> None:
    """RunError when the base model served here is not the one a checkpoint was trained on."""
    if manifest.base_revision != info.revision:
        raise RunError(
            "base_revision_mismatch",
            f"'tinker://{key}' was trained on another version of base model {info.name!r}: its "
            f"files hash to {manifest.base_revision}, those served here to {info.revision}",
        )


def loaded(manifest: Manifest, config: RunConfig, *, optimizer: bool) -> Captured:
    """What a load leaves behind: a function of the checkpoint alone."""
    if not optimizer:
        files = {name: blob for name, blob in manifest.files.items() if name != OPTIMIZER_STATE}
        return Captured(StateInfo(config, 0, 0), files)
    state = StateInfo(
        config,
        manifest.step,
        manifest.pending_forward_backwards,
        manifest.incomplete,
    )
    return Captured(state, manifest.files)


def result(
    body: Load | CreateFromState, manifest: Manifest, state: StateInfo, info: BaseModelInfo
) -> bytes:
    """What the client hears: where the state stands, and whether the numerics agree."""
    return bodies.encode_json(
        {
            "path": f"tinker://{body.key}",
            "step": state.step,
            "pending_forward_backwards": state.pending_forward_backwards,
            "incomplete": None if state.incomplete is None else state.incomplete.message,
            "same_numerics": dict(manifest.fingerprint) == dict(info.fingerprint),
        }
    )


def _check_fit(key: NameKey, manifest: Manifest, config: RunConfig, *, optimizer: bool) -> None:
    """Raises RunError naming the first thing in which a checkpoint and a run differ."""
    mine, theirs = config.lora, manifest.lora
    pairs: list[tuple[str, object, object]] = [
        ("base model", config.base_model, manifest.base_model),
        ("LoRA rank", mine.rank, theirs.rank),
        ("LoRA alpha", mine.alpha, theirs.alpha),
        ("train_attn", mine.train_attn, theirs.train_attn),
        ("train_mlp", mine.train_mlp, theirs.train_mlp),
        ("train_unembed", mine.train_unembed, theirs.train_unembed),
    ]
    if optimizer:
        pairs.append(("optimizer", config.optimizer, manifest.optimizer))
    for name, ours, saved in pairs:
        if ours != saved:
            raise RunError(
                "incompatible_checkpoint",
                f"'tinker://{key}' does not fit this run: the checkpoint has {name} {saved}, "
                f"the run has {ours}",
            )
