"""Pages go to a page server of the other one, by CRIU's own protocol: phaul's takes CRIU's, CRIU's takes phaul's."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.interop.test_states import phaul, run, started


def test_criu_sends_to_phaul(criu: Path, tmp_path: Path) -> None:
    with started("memory", tmp_path) as program:
        family, images, pages = program.family(), program.images, tmp_path / "pages"
        command = [sys.executable, "-m", "phaul", "page-server", "--images", str(pages), "--listen", "127.0.0.1:0"]
        with subprocess.Popen([*command, "--plain"], stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = server.stdout.readline().strip().rpartition(":")[2]
            words = ("--page-server", "--address", "127.0.0.1", "--port", port)
            run(criu, "dump", "-t", program.pid, "-D", images, "-o", "dump.log", *words, log=images / "dump.log")
            assert server.wait(30) == 0
        program.until_gone(family)
        assert not list(images.glob("pages-*"))
        for file in pages.iterdir():
            shutil.copy(file, images)
        phaul("restore", "--images", images, "--detach")
        program.well()


def test_phaul_sends_to_criu(criu: Path, tmp_path: Path) -> None:
    with started("memory", tmp_path) as program:
        family, images, pages = program.family(), program.images, tmp_path / "pages"
        pages.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        command = [
            str(criu),
            "page-server",
            "-D",
            str(pages),
            "-o",
            "server.log",
            "--address",
            "127.0.0.1",
            "--port",
            port,
        ]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as server:
            _until_it_listens(int(port))
            phaul("dump", "--pid", program.pid, "--images", images, "--page-server", f"127.0.0.1:{port}")
            assert server.wait(30) == 0, (pages / "server.log").read_text()
        program.until_gone(family)
        assert not list(images.glob("pages-*"))
        for file in pages.glob("page*.img"):
            shutil.copy(file, images)
        run(criu, "restore", "-d", "-D", images, "-o", "restore.log", log=images / "restore.log")
        program.well()


def _until_it_listens(port: int) -> None:
    """CRIU takes one client only, so it is not asked but looked for."""
    deadline = time.monotonic() + 30
    while f":{port:04X} 00000000:0000 0A" not in Path("/proc/net/tcp").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
