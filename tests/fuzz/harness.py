"""The native fuzzers: each a file of `native/` with the sources that it tries, under AddressSanitizer and
UndefinedBehaviorSanitizer; with libFuzzer where clang is, else with `native/standalone.c`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
_NATIVE = HERE.parents[1] / "engine" / "native"
_FLAGS = ("-g", "-O1", "-std=gnu11", "-D_GNU_SOURCE", "-fno-sanitize-recover=all", "-Wall", "-Wextra", "-Werror")
_QUIET = ("-Wno-unused-parameter", "-Wno-missing-field-initializers")
_LARGEST = 65536  # bytes of an input
_LIMIT = 1 << 11  # megabytes that a fuzzer may use

SUBJECTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sink": (
        ("page_sink.c", "frame.c", "page_io.c", "xxh64.c", "stream_threads.c", "error.c"),
        ("-lzstd", "-lpthread"),
    ),
    "channel": (("channel.c", "error.c"), ("-lpthread",)),
    "extents": (("extents.c", "error.c"), ()),
}


def clang() -> str | None:
    """The compiler that brings libFuzzer, if it is here."""
    found = shutil.which("clang")
    if found is None:
        return None
    has = subprocess.run([found, "-print-file-name=libclang_rt.fuzzer-x86_64.a"], capture_output=True, text=True)
    directory = subprocess.run([found, "-print-runtime-dir"], capture_output=True, text=True).stdout.strip()
    return found if os.path.exists(has.stdout.strip()) or list(Path(directory).glob("*fuzzer-x86_64*")) else None


def build(name: str, directory: Path, compiler: str | None) -> Path:
    """Compile a fuzzer; with no `compiler` (of libFuzzer's) the standalone one. CalledProcessError if it fails."""
    sources, libraries = SUBJECTS[name]
    fuzzer = directory / name
    made = [str(HERE / "native" / f"{name}.c"), *(str(_NATIVE / "src" / source) for source in sources)]
    kind = ["-fsanitize=fuzzer,address,undefined"] if compiler else ["-fsanitize=address,undefined"]
    made += [] if compiler else [str(HERE / "native" / "standalone.c")]
    include = [f"-I{_NATIVE / 'include'}", f"-I{_NATIVE / 'src'}"]
    command = [compiler or "cc", *_FLAGS, *_QUIET, *kind, *include, *made, *libraries, "-o", str(fuzzer)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return fuzzer


def command(fuzzer: Path, seconds: int, seed: int, found: Path, *, libfuzzer: bool) -> list[str]:
    """How a fuzzer is run for a while: what it finds goes to `found`, what is known comes from the corpus."""
    corpus = CORPUS / fuzzer.name
    if not libfuzzer:
        return [str(fuzzer), str(seconds), str(seed), str(corpus)]
    limits = [f"-max_total_time={seconds}", f"-max_len={_LARGEST}", f"-rss_limit_mb={_LIMIT}", "-timeout=20"]
    return [str(fuzzer), *limits, f"-seed={seed}", f"-artifact_prefix={found}/", str(found), str(corpus)]
