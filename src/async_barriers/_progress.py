"""Reporting who is still missing."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ._errors import describe, plural_ranks
from ._values import BarrierProgress

# The parent of this module's logger: users switch the library's warnings by its name.
logger = logging.getLogger("async_barriers")


def report(
    progress: BarrierProgress, on_progress: Callable[[BarrierProgress], object] | None
) -> None:
    """Log one WARNING and call ``on_progress``; what it raises is logged, not passed on."""
    logger.warning(
        "%s: %d of %d ranks after %.1f s, missing %s",
        describe(progress.name, progress.sequence),
        progress.arrived,
        progress.world_size,
        progress.waited_secs,
        plural_ranks(progress.missing_ranks).partition(" ")[2] or "none",
    )
    if on_progress is not None:
        try:
            on_progress(progress)
        except Exception:
            logger.exception("on_progress raised")
