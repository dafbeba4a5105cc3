"""Who is asking: API keys and the owners they stand for."""

from __future__ import annotations

import hashlib
import secrets
import time
import uuid
from dataclasses import dataclass

import sqlalchemy as sa

from holdfast.catalog import Catalog
from holdfast.catalog.tables import api_keys
from holdfast.protocol.errors import AuthenticationError

LOCAL_OWNER = "local"
"""Owns everything on a server without keys, which listens on this machine alone."""
PREFIX = "tml-"
"""What clients insist that a key begins with."""


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key as it is listed: the key itself is not kept."""

    id: str
    owner: str
    created: float


class Keys:
    """The API keys of a server. Without any, every caller is the local owner."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._owners: dict[str, str] = {}
        self.reload()

    @property
    def required(self) -> bool:
        """Whether callers need a key."""
        return bool(self._owners)

    def reload(self) -> None:
        """Read the keys again."""
        self._owners = self._catalog.read_now(
            lambda c: {
                row.hash: row.owner
                for row in c.execute(
                    sa.select(api_keys.c.hash, api_keys.c.owner).where(api_keys.c.revoked.is_(None))
                )
            }
        )

    def owner(self, key: str | None) -> str:
        """The owner that a key stands for. Raises AuthenticationError when it stands for none."""
        if not self.required:
            return LOCAL_OWNER
        if not key:
            raise AuthenticationError(
                "this server needs an API key; set TINKER_API_KEY to one that `holdfast key create`"
                " printed"
            )
        owner = self._owners.get(_hash(key))
        if owner is None:
            raise AuthenticationError(
                "this API key is not known here; ask who runs this server for one, or make one by "
                "`holdfast key create`"
            )
        return owner

    async def create(self, owner: str) -> str:
        """A new key for an owner, shown this once."""
        key = PREFIX + secrets.token_urlsafe(32)
        row = {
            "id": uuid.uuid4().hex[:12],
            "hash": _hash(key),
            "owner": owner,
            "created": time.time(),
        }
        await self._catalog.write(lambda c: c.execute(api_keys.insert().values(row)))
        self.reload()
        return key

    async def revoke(self, key_id: str) -> bool:
        """Take a key back, by its id. False when there is none."""
        done = await self._catalog.write(
            lambda c: (
                c.execute(
                    api_keys.update()
                    .where((api_keys.c.id == key_id) & api_keys.c.revoked.is_(None))
                    .values(revoked=time.time())
                ).rowcount
            )
        )
        self.reload()
        return done > 0

    def all(self) -> list[KeyInfo]:
        """The keys in force."""
        return self._catalog.read_now(
            lambda c: [
                KeyInfo(row.id, row.owner, row.created)
                for row in c.execute(
                    sa.select(api_keys)
                    .where(api_keys.c.revoked.is_(None))
                    .order_by(api_keys.c.created)
                )
            ]
        )


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
