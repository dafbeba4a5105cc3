"""Tokenizer files of base models that a client's machine cannot get elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse

from holdfast.protocol.errors import NotFoundError
from holdfast.server.context import Context, ContextDep, OwnerDep

router = APIRouter()

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""What is served; nothing else of a model's directory is."""


@router.get("/tokenizers/{model:path}/files/{file}")
async def get_file(model: str, file: str, _owner: OwnerDep, context: ContextDep) -> FileResponse:
    if file not in FILES:
        raise NotFoundError(f"{file!r} is not a tokenizer file; those are {', '.join(FILES)}")
    path = _directory(context, model) / file
    if not path.is_file():
        raise NotFoundError(f"base model {model!r} has no {file}")
    return FileResponse(path)


@router.get("/tokenizers/{model:path}")
async def list_files(model: str, _owner: OwnerDep, context: ContextDep) -> dict[str, Any]:
    directory = _directory(context, model)
    return {"files": [name for name in FILES if (directory / name).is_file()]}


def _directory(context: Context, model: str) -> Path:
    source = context.settings.models.get(model)
    if source is None:
        known = ", ".join(repr(name) for name in context.settings.models)
        raise NotFoundError(f"base model {model!r} is not served here; there is {known}")
    directory = Path(source.path)
    if not directory.is_dir():
        raise NotFoundError(
            f"base model {model!r} comes from the hub, and its tokenizer with it: load "
            f"{source.tokenizer or source.path!r} there"
        )
    return directory
