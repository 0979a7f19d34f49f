"""Reports of the ranks that are still missing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from ._errors import describe, plural_ranks
from ._missing import told
from ._values import BarrierProgress

# The parent of this module's logger: users switch the library's warnings by its name.
logger = logging.getLogger("async_barriers")


def report(
    progress: BarrierProgress,
    on_progress: Callable[[BarrierProgress], object] | None,
    prefix: str = "",
    global_ranks: Sequence[int] | None = None,
) -> None:
    """Log one WARNING and call ``on_progress``; its exception is logged, not passed on."""
    ranks = plural_ranks(progress.missing_ranks).partition(" ")[2]
    logger.warning(
        "%s: %d of %d ranks after %.1f s, missing %s",
        describe(progress.name, progress.sequence, prefix),
        progress.arrived,
        progress.world_size,
        progress.waited_secs,
        told(progress.missing, global_ranks) or ranks or "none",
    )
    if on_progress is not None:
        try:
            on_progress(progress)
        except Exception:
            logger.exception("on_progress raised")
