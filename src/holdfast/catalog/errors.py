"""What can go wrong with the catalog, by what to do about it.

CatalogUnavailable          try again later: nothing was stored
CannotOpen                  change what is said in the message
├── NewerCatalog
└── CatalogInUse
SyncFailed, EpochLost       none of the caller's business: the process ends
"""

from __future__ import annotations


class CatalogUnavailable(Exception):
    """The database did not take a write (locked, full, not there), of which nothing was stored.

    Or it cannot be read now (no file descriptor or connection is free, the disk does not answer).
    """


class CannotOpen(Exception):
    """There is no catalog at this address that this process could use."""


class NewerCatalog(CannotOpen):
    """The database was written by a newer Holdfast."""


class CatalogInUse(CannotOpen):
    """Another server has the catalog."""


class SyncFailed(Exception):
    """What was written last may be lost, though this process can still read it.

    A second sync may succeed without having written it, so the process ends. The next one sees
    what is really there.
    """


class EpochLost(Exception):
    """Another server, or a repair, has taken the catalog over."""
