"""Our own handles of a user's store."""

from __future__ import annotations

import secrets
from datetime import timedelta
from typing import Any

from torch.distributed import FileStore, HashStore, PrefixStore, Store, TCPStore

from .._errors import BarrierConnectionError, told_by
from .._system import why_unusable
from .blocking_store import innermost

_NAMESPACE = "async_barriers/namespace"


def copy_of(store: Store) -> Store:
    """Our own handle of the same store as ``store``, whose timeout stays as it is."""
    # torch's stubs have `clone` in some versions only.
    held: Any = store
    base: Any = innermost(store)
    if isinstance(base, FileStore):
        path: str = base.path  # type: ignore[attr-defined]
        # c10d's constructor would try again and again, and hold the GIL meanwhile.
        if why := why_unusable(path):
            raise BarrierConnectionError(f"the file of the FileStore {path!r} is of no use: {why}")
        # A clone would count as a user, and the file is deleted only when all users are gone.
        return FileStore(path)
    if store is not base and not isinstance(base, TCPStore | HashStore):
        # torch loses what is written in Python of a store that it clones within another one.
        return store
    if not hasattr(store, "clone"):
        # In torch 2.9. A HashStore is thread-safe itself, and so is a store written in Python.
        if not isinstance(base, TCPStore):
            return store
        client = client_of(base.host, base.port)
        return client if store is base else PrefixStore(agreed_namespace(store), client)
    try:
        clone: Store = held.clone()
        return clone
    except RuntimeError as exc:
        if "pure virtual" not in str(exc):
            raise
        # A store written in Python without clones has to be thread-safe.
        return store


def agreed_namespace(store: Store) -> str:
    """The prefix of our keys for all ranks that use ``store``, a PrefixStore; blocks.

    A PrefixStore does not tell its own prefix. So all ranks agree on one token there, and all our
    keys begin with it, outside of the store's prefix.
    """
    held: Any = store
    try:
        won = bytes(held.compare_set(_NAMESPACE, "", secrets.token_hex(8)))
    except Exception as exc:
        raise BarrierConnectionError(f"the store was lost ({told_by(exc)})") from exc
    return f"async_barriers.{won.decode()}/"


def client_of(host: str, port: int) -> TCPStore:
    """c10d's client of a TCPStore. Blocks; call it when the server is known to answer."""
    return TCPStore(
        host, port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False
    )
