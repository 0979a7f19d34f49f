"""A rank that trains until its signal is reached; run by test_step_signal.

python signal_rank.py RANK WORLD_SIZE PORT PACE_SECS
"""

from __future__ import annotations

import signal
import sys
import time

from torch.distributed import TCPStore

from async_barriers import BarrierError, StoreBarrier
from async_barriers.blocking import BlockingBarrier


def main() -> None:
    rank, world_size, port = map(int, sys.argv[1:4])
    store = TCPStore("127.0.0.1", port, wait_for_workers=False)
    barrier = StoreBarrier(store, rank=rank, world_size=world_size, timeout_secs=20)
    # No `with`, nor close: its process just ends.
    stop = BlockingBarrier(barrier).step_signal()
    signal.signal(signal.SIGTERM, lambda *_: stop.send("SIGTERM"))
    for step in range(1_000_000):
        try:
            if stop.reached(step):
                print("reached", step, stop.step, stop.rank, stop.reason, flush=True)
                return
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            return
        except BarrierError as exc:
            print("told", type(exc).__name__, exc, flush=True)
            return
        if step == 3:
            print("trains", flush=True)
        time.sleep(float(sys.argv[4]))


main()
