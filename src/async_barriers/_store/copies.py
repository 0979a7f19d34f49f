"""Stores of our own that lead where one of the user's leads."""

from __future__ import annotations

import secrets
from datetime import timedelta
from typing import Any

from torch.distributed import FileStore, PrefixStore, Store, TCPStore

from .._errors import BarrierConnectionError, told_by
from .blocking_store import innermost

_NAMESPACE = "async_barriers/namespace"


def copy_of(store: Store) -> Store:
    """A store of our own that leads where ``store`` leads; its owner's timeout stays as it is."""
    # torch's stubs know it in some versions only.
    held: Any = store
    base: Any = innermost(store)
    if isinstance(base, FileStore):
        # A clone would count as one of the users that have to be gone before the file is deleted.
        return FileStore(base.path)  # type: ignore[attr-defined]
    if not hasattr(store, "clone"):
        return _without_clone(store, base)
    try:
        clone: Store = held.clone()
        return clone
    except RuntimeError as exc:
        if "pure virtual" not in str(exc):
            raise
        # A store written in Python that has no clones; it has to be thread-safe.
        return store


def _without_clone(store: Store, base: Any) -> Store:
    """What torch 2.9 can do. A HashStore, and one written in Python, is thread-safe itself."""
    if not isinstance(base, TCPStore):
        return store
    client = client_of(base.host, base.port)
    return client if store is base else PrefixStore(agreed_namespace(store), client)


def agreed_namespace(store: Store) -> str:
    """What our keys stand behind for all who come through ``store``, a PrefixStore; blocks.

    It does not tell its prefix. So one token wins there, for all ranks, and all our keys stand
    behind it, outside of the prefix.
    """
    held: Any = store
    try:
        won = bytes(held.compare_set(_NAMESPACE, "", secrets.token_hex(8)))
    except Exception as exc:
        raise BarrierConnectionError(f"the store was lost ({told_by(exc)})") from exc
    return f"async_barriers.{won.decode()}/"


def client_of(host: str, port: int) -> TCPStore:
    """c10d's client of a TCPStore. Blocks; to be called when the server is known to answer."""
    return TCPStore(
        host, port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False
    )
