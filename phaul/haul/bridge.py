"""The "remote shell" of rsync(1): what it starts to reach the other host (`rsync.py`).

`bridge.py STREAM SAID HOST WORD...`: tells on descriptor SAID what it was asked to run there, and then joins its own
standard input and output to the socket STREAM, until that ends.
"""

from __future__ import annotations

import os
import sys
import threading

_READ = 1 << 18  # bytes


def _copy(source: int, target: int) -> None:
    try:
        while data := memoryview(os.read(source, _READ)):
            while data:
                data = data[os.write(target, data) :]
    except OSError:
        pass  # whoever was to have it has ended


def main(stream: int, said: int, words: list[str]) -> None:
    """Serve one rsync."""
    os.write(said, f"{' '.join(words)}\n".encode())
    threading.Thread(target=_copy, args=(0, stream), daemon=True).start()
    _copy(stream, 1)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[4:])
