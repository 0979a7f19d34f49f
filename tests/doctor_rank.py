"""The program of a rank that runs the doctor, where a test forks it."""

from __future__ import annotations

import sys

from async_barriers.__main__ import check, parser


async def main(*arguments: str) -> None:
    """As the command does, with the variables that torchrun sets."""
    sys.exit(await check(parser().parse_args(["doctor", *arguments])))
