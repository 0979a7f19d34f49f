"""The errors of this library, and how their messages are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ._values import MissingRank

_MOST_TOLD = 600
_MOST_SAID = 2000
# A name may have kilobytes.
_MOST_NAMED = 200
_WRITTEN_IN_C = type(BaseException.__str__)


def in_one_line(text: str, most: int = _MOST_TOLD) -> str:
    """Shorten a text of others, and remove the characters that could break a log line."""
    shown = text[: 4 * most]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else " " for c in shown)
    shown = " ".join(shown.split())
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def causes(exc: BaseException) -> Iterator[BaseException]:
    """The exception, and those that it was raised from; each once, as a program can make a circle
    of them."""
    cause: BaseException | None = exc
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


def leaves_of(exc: BaseException) -> list[BaseException]:
    """The single exceptions of a group, and of the groups in it; of any other, itself."""
    leaves: list[BaseException] = []
    todo, seen = [exc], {id(exc)}
    while todo:
        each = todo.pop(0)
        try:
            # Recognised by its attribute, since Python 3.10 has no groups of its own.
            parts = getattr(each, "exceptions", None)
        except Exception:
            parts = None
        if not (isinstance(parts, tuple) and parts):
            leaves.append(each)
            continue
        # A program can make a circle of them.
        new = [one for one in parts if isinstance(one, BaseException) and id(one) not in seen]
        seen.update(map(id, new))
        todo += new
    return leaves or [exc]


def told_by(exc: BaseException) -> str:
    """The message of an exception, in one line; describing it never fails.

    Of a group it names the single exceptions, since the group itself only counts them.
    """
    leaves = leaves_of(exc)
    if leaves[0] is not exc:
        told = list(dict.fromkeys(told_by(leaf) for leaf in leaves[:5]))
        more = f" and {len(leaves) - 5} more" if len(leaves) > 5 else ""
        return in_one_line("; ".join(told) + more)
    try:
        said = str(exc)
    except BaseException as failed:
        # Only a __str__ in Python can have raised it; else it is a signal handler's, and goes on.
        if not isinstance(failed, Exception) and isinstance(type(exc).__str__, _WRITTEN_IN_C):
            raise
        said = "(it cannot be described: its __str__ raises)"
    # c10d puts stack traces behind the first line of its message.
    if type(exc).__module__.startswith(("torch", "builtins")):
        said = said.partition("\n")[0]
    return in_one_line(f"{type(exc).__name__}: {said}" if said else type(exc).__name__)


def seconds(value: float) -> str:
    """``4 s``, ``0.25 s``: rounded as a person would."""
    if 0 < value < 0.01:
        return f"{value:.1g} s"
    return f"{round(value, 2 if value < 10 else 1):.10g} s"


def out_of_threads(exc: BaseException) -> str:
    """The end of a message if no thread could be started: why, and what to look at."""
    return f"({exc}); this process or its user has reached a limit of threads (ulimit -u, pids.max)"


def describe(name: str, sequence: int | None = None, prefix: str = "") -> str:
    """How messages speak of a phase, ``barrier 'ckpt/step-100' #3``, or of a barrier."""
    shown = in_one_line(f"{prefix}/{name}" if prefix and name else prefix or name, _MOST_NAMED)
    return f"barrier {shown!r}" if sequence is None else f"barrier {shown!r} #{sequence}"


def plural_ranks(ranks: tuple[int, ...]) -> str:
    """``rank 3`` or ``ranks 3, 5``; long lists end in a count, the attribute has them all."""
    shown = ", ".join(map(str, ranks[:20]))
    rest = len(ranks) - 20
    return f"rank{'s' if len(ranks) != 1 else ''} {shown}{f' and {rest} more' if rest > 0 else ''}"


class BarrierError(Exception):
    """The base of all errors of this library.

    :ivar in_doubt: True if this rank entered the phase and could not learn its verdict, so that
        other ranks may have been released. False in all other cases.
    """

    in_doubt: bool

    def __init__(self, message: str, *, in_doubt: bool = False) -> None:
        # Text of others may be in it, and a log needs one line.
        super().__init__(in_one_line(message, _MOST_SAID))
        self.in_doubt = in_doubt

    def __reduce__(self) -> tuple[Any, ...]:
        # The message is built by __init__ from other arguments than those that
        # Exception remembers, so the default way to unpickle would call it wrongly.
        return (_rebuild, (type(self), BaseException.__str__(self), self.__dict__))


def _rebuild(cls: type[BarrierError], message: str, state: dict[str, Any]) -> BarrierError:
    error = cls.__new__(cls, message)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class _PhaseError(BarrierError):
    """An error of one phase, with which its message begins."""

    name: str
    sequence: int
    prefix: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __str__(self) -> str:
        # Only when it is asked for: the prefix may become known after the error is made.
        return f"{describe(self.name, self.sequence, self.prefix)} {self._what()}"

    def _what(self) -> str:
        return BaseException.__str__(self)


class BarrierTimeoutError(_PhaseError, TimeoutError):
    """A deadline broke the phase. Every rank that learns of it gets this error.

    :ivar name: the name given at the call
    :ivar sequence: which crossing of that name it was, from 0; or the step that was given
    :ivar missing_ranks: exactly the ranks that had not entered when the deadline passed, sorted
    :ivar timeout_secs: the deadline that passed, in seconds; or how long a rank had shown no
        progress, if that broke the phase (``stalled_after_secs``)
    :ivar missing: what was then known of the missing ranks; of the first 1,024 of them
    :ivar prefix: the barrier's, if it has one; part of the message
    """

    def __init__(
        self,
        name: str,
        sequence: int,
        missing_ranks: tuple[int, ...],
        timeout_secs: float,
        *,
        detail: str = "",
        in_doubt: bool = False,
        prefix: str = "",
        missing: tuple[MissingRank, ...] = (),
    ) -> None:
        if not detail:
            detail = (
                f"{plural_ranks(missing_ranks)} had not entered; look for a crash or a stall "
                "there, or allow a longer timeout_secs"
                if missing_ranks
                else "no rank was missing; a commit's leader did not begin to publish in time"
            )
        super().__init__(
            f"timed out after {seconds(timeout_secs)}: {in_one_line(detail)}", in_doubt=in_doubt
        )
        self.name = name
        self.sequence = sequence
        self.missing_ranks = missing_ranks
        self.timeout_secs = timeout_secs
        self.prefix = prefix
        self.missing = missing


class BrokenBarrierError(_PhaseError):
    """A rank broke the phase, or this barrier can no longer be used.

    :ivar name: the name given at the call
    :ivar sequence: which crossing of that name it was, from 0; or the step that was given
    :ivar rank: the rank that broke it; None if no rank is to blame
    :ivar reason: why, in words
    :ivar prefix: the barrier's, if it has one; part of the message
    :ivar global_rank: of a subgroup's barrier, the number of ``rank`` in the job; part of the
        message
    """

    global_rank: int | None = None

    def __init__(
        self,
        name: str,
        sequence: int,
        rank: int | None,
        reason: str,
        *,
        in_doubt: bool = False,
        prefix: str = "",
    ) -> None:
        super().__init__(in_one_line(reason), in_doubt=in_doubt)
        self.name = name
        self.sequence = sequence
        self.rank = rank
        self.reason = reason
        self.prefix = prefix

    def _what(self) -> str:
        in_job = "" if self.global_rank is None else f" (global rank {self.global_rank})"
        by = "" if self.rank is None else f" by rank {self.rank}{in_job}"
        return f"was broken{by}: {super()._what()}"


class BarrierConnectionError(BarrierError, ConnectionError):
    """The store cannot be reached, or was lost before or while waiting.

    If torch raised an exception of its own, it is the ``__cause__``.
    """


def caused(
    cause: BaseException | None, text: str, *, in_doubt: bool = False
) -> BarrierConnectionError:
    """The error that says ``text``, with its ``__cause__``."""
    error = BarrierConnectionError(text, in_doubt=in_doubt)
    error.__cause__ = cause
    return error


def another(
    error: BarrierConnectionError, about: str = "", *, in_doubt: bool | None = None
) -> BarrierConnectionError:
    """The same error for another caller: an error that is raised twice has both tracebacks.

    :param about: the barrier or phase of the error, if its message does not say so
    :param in_doubt: of the copy, if it differs
    """
    text = f"{about}: {error}" if about else str(error)
    doubts = error.in_doubt if in_doubt is None else in_doubt
    return caused(error.__cause__, text, in_doubt=doubts)


def unanswered(
    why: BaseException | None, about: str = "", *, untold: bool = False
) -> BarrierConnectionError:
    """The error of a call that a store left unanswered, for a reason that may be known.

    :param about: the barrier or phase of the error, if another one does not say so
    :param untold: whether the call goes on until the store takes it
    """
    told = "" if why is None else f" ({told_by(why)})"
    then = "; its peers are told as soon as it does" if untold else ""
    text = f"the store did not answer in time{told}{then}"
    return caused(why, f"{about}: {text}" if about else text)


def of_another_process(what: str, built_in: int) -> BarrierError:
    """The error of ``what`` in a process that was forked from the one, ``built_in``, it is of."""
    return BarrierError(
        f"{what} was built in process {built_in} and belongs to it; this is process {os.getpid()}, "
        "forked from there: build it in the process that uses it"
    )


class BarrierClosedError(BarrierError):
    """The barrier was used after ``aclose()``, or it was closed while this call waited."""

    def __init__(self, barrier: str) -> None:
        super().__init__(f"{barrier} is closed; build a new one to go on")
