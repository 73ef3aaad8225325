"""A program with threads and a child process that checks itself: python3 threads_and_child.py STATUS

Two threads count under one lock; the main thread writes numbers to a child (cat) through a pipe and must read the same
numbers back. STATUS holds "COUNT ok", or what went wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

PAUSE = 0.002


def main() -> None:
    """Runs until it is killed, or until something is wrong."""
    status = sys.argv[1]
    lock, local = threading.Lock(), threading.local()
    counts = {"total": 0}

    def tell(text: str) -> None:
        with open(f"{status}.new", "w") as file:
            file.write(text)
        os.rename(f"{status}.new", status)

    def work() -> None:
        local.own = 0
        while True:
            with lock:
                counts["total"] += 1
            local.own += 1
            mine[threading.get_ident()] = local.own
            time.sleep(PAUSE)

    mine: dict[int, int] = {}
    for _ in range(2):
        threading.Thread(target=work, daemon=True).start()
    pid, number = os.getpid(), 0
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        while True:
            number += 1
            child.stdin.write(b"%d\n" % number)
            child.stdin.flush()
            answer = child.stdout.readline()
            with lock:
                total, parts = counts["total"], sum(mine.values())
            if answer != b"%d\n" % number or child.poll() is not None or os.getpid() != pid:
                tell(f"{number} wrong: child {child.poll()} said {answer!r}")
                return
            if not 0 <= total - parts <= 2:
                tell(f"{number} wrong: {total} counted together, {parts} by the threads")
                return
            tell(f"{number} ok")
            time.sleep(PAUSE)


if __name__ == "__main__":
    main()
