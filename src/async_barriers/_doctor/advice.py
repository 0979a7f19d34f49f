"""The advice about an error, by its cause."""

from __future__ import annotations

import errno
import socket

from .._errors import (
    BarrierConnectionError,
    BarrierError,
    BarrierTimeoutError,
    causes,
    plural_ranks,
    seconds,
)
from .._store.connecting import NotUnderstood
from .._store.sources import CannotHost
from .newcomer import LookUps

_SLOW_SECS = 0.25
_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


def advice(error: BaseException, look_ups: LookUps | None = None) -> str:
    """The advice, in words."""
    if isinstance(error, BarrierTimeoutError) and error.missing_ranks:
        return (
            f"look at the output of {plural_ranks(error.missing_ranks)}: is it stopped, or its "
            "machine busy? If it is slow, give a longer --timeout-secs"
        )
    if isinstance(error, BarrierConnectionError) and look_ups is not None:
        return _of_connecting(error, look_ups)
    if isinstance(error, ValueError):
        return "start it as `torchrun ... -m async_barriers doctor`, or without any of these set"
    return "see the output of the rank that is named, and that all ranks were started alike"


def _of_connecting(error: BarrierError, look_ups: LookUps) -> str:
    host, port = look_ups.address
    for cause in causes(error):
        if isinstance(cause, CannotHost):
            return (
                "rank 0 hosts the store, and cannot: end the process that holds the port, or give "
                "all ranks another MASTER_PORT"
            )
        if isinstance(cause, NotUnderstood):
            return (
                f"wrong service: another program listens at {host}:{port}. Give all ranks the "
                "MASTER_PORT of rank 0's store. If it is a TCPStore, of another version of torch "
                "perhaps, set ASYNC_BARRIERS_WORKER_THREADS=1"
            )
        if isinstance(cause, socket.gaierror):
            return (
                f"name: {host!r} is not known on this machine. See its spelling in MASTER_ADDR, "
                f"`getent hosts {host}` here, /etc/hosts and the resolver; an address needs no "
                "look-up"
            )
        if isinstance(cause, ConnectionRefusedError):
            return (
                f"refused: the machine {host} answers, but nothing listens at port {port}. Is rank "
                "0 up, or did it end (see its output)? Do MASTER_ADDR and MASTER_PORT agree on all "
                "ranks?"
            )
        if isinstance(cause, OSError) and cause.errno in _UNREACHABLE:
            return (
                f"unreachable: no route leads from here to {host}. See MASTER_ADDR, and this "
                "machine's network"
            )
        if isinstance(cause, TimeoutError):
            return _of_time_out(str(cause), look_ups)
    return _of_time_out("", look_ups)


def _of_time_out(said: str, look_ups: LookUps) -> str:
    host, port = look_ups.address
    forward, reverse = look_ups.secs
    names = ""
    if max(forward, reverse) > _SLOW_SECS:
        names = (
            f". Name look-ups are slow here: {seconds(forward)} for {host}, {seconds(reverse)} "
            "back; see /etc/resolv.conf"
        )
    if "says nothing" in said:
        return (
            f"time-out: a program at {host}:{port} takes connections and stays silent. It is no "
            "store, or its process is stopped, or it waits for a resolver that does not answer: "
            "c10d's server looks up the name of each process that connects" + names
        )
    return (
        f"time-out: packets to {host}:{port} are not answered. See for a firewall, for a machine "
        "that is down, and that MASTER_ADDR is an address that this machine can reach" + names
    )
