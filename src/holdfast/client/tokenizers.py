"""The tokenizer of a base model: from the server when it has the files, else from the hub."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from holdfast.client.futures import Future
from holdfast.client.http import Server
from holdfast.protocol.bodies import Body
from holdfast.protocol.errors import InvalidAnswerError, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class TokenizerFiles(Body):
    """What `tokenizers/NAME` answers."""

    files: list[str]


def load_tokenizer(
    server: Server, base_model: str, tokenizer_id: str | None
) -> PreTrainedTokenizerBase:
    """Load it with transformers, which is imported here. Files are kept in a cache folder."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise RequestError("get_tokenizer needs transformers, which is not installed") from None
    folder = Future(_fetch(server, base_model), server.runtime).result()
    name = tokenizer_id or base_model.partition(":")[0]
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        name if folder is None else str(folder)
    )
    return loaded


async def _fetch(server: Server, base_model: str) -> Path | None:
    """The folder with the server's files; None when it offers none."""
    address = f"tokenizers/{quote(base_model)}"
    answer = await server.call("GET", address, accept=frozenset({404, 405}))
    if answer.status >= 300:
        return None
    names = answer.read(TokenizerFiles).files
    key = hashlib.sha256(f"{server.base_url}\n{base_model}".encode()).hexdigest()[:24]
    folder = cache_folder() / "tokenizers" / key
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not _FILE_NAME.fullmatch(name):
            raise InvalidAnswerError(f"the server names a tokenizer file {name!r:.80}")
        # Fetched each time, so a server's new tokenizer is never mixed with an old one.
        answer = await server.call("GET", f"{address}/files/{name}")
        await asyncio.to_thread(_replace, folder / name, answer.content)
    return folder


def _replace(path: Path, content: bytes) -> None:
    handle, part = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    Path(part).replace(path)


def cache_folder() -> Path:
    """`HOLDFAST_CACHE`, or `holdfast` in the user's cache folder."""
    given = os.environ.get("HOLDFAST_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "holdfast"
