"""Make `pb/` from `proto/`: python -m phaul.transport.generate. Needs grpcio-tools (the `dev` extra); commit what it
writes, so that nobody else does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Compile all of it."""
    proto, out = HERE / "proto", HERE / "pb"
    names = sorted(source.name for source in proto.glob("*.proto"))
    outputs = [f"--python_out={out}", f"--pyi_out={out}"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{proto}", *outputs, *names], check=True)


if __name__ == "__main__":
    main()
