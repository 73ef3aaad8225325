"""Make `pb/*_pb2.py` and `pb/*_pb2.pyi` from `proto/*.proto`: python engine/phaul_engine/images/generate.py.

Run it after a change of a .proto file and commit what it writes: neither a build nor an installation needs protoc.
It comes from grpcio-tools (in the `dev` extra).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "phaul_engine.images.pb"
HERE = Path(__file__).resolve().parent

# protoc writes imports between its modules as if they were top level.
_IMPORT = re.compile(r"^import (\w+_pb2) as ", re.MULTILINE)


def generate(proto: Path, out: Path) -> None:
    """Compile every .proto file of a directory into modules of `PACKAGE`, and remove modules without a source."""
    sources = sorted(proto.glob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [f"--python_out={scratch}", f"--pyi_out={scratch}"]
        names = [source.name for source in sources]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{proto}", *outputs, *names], check=True)
        made = {path.name: path.read_text() for path in Path(scratch).iterdir()}
    for stale in [path for path in out.glob("*_pb2.py*") if path.name not in made]:
        stale.unlink()
    for name, text in made.items():
        (out / name).write_text(_IMPORT.sub(rf"from {PACKAGE} import \1 as ", text))


if __name__ == "__main__":
    generate(HERE / "proto", HERE / "pb")
