"""A program that keeps its state in registers alone finds every bit of it again: general, x87, SSE, AVX, AVX-512."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.kernel.skeletons import remake, take

# VECTORS bytes are loaded into vector registers by LOAD and stored again by STORE, when the signal has come.
_HOLDER = r"""
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

static volatile sig_atomic_t go;
static uint64_t before[256], after[256], masks[8], masks_after[8];
static uint32_t control = 0xff80, control_after; /* MXCSR: all masked, towards zero, flush to zero */
static uint16_t x87 = 0x0e7f, x87_after;         /* control word: towards zero, 53 bits */
static double deep = 1.0 / 3, deep_after;

static void
wake (int signo)
{
	(void) signo;
	go = 1;
}

int
main (void)
{
	uint64_t general = 0x0123456789abcdef, kept;
	for (int i = 0; i < 256; i++)
		before[i] = 0x9e3779b97f4a7c15u * (i + 1);
	for (int i = 1; i < 8; i++)
		masks[i] = 0xa5a5u * i & 0xffff;
	signal (SIGUSR1, wake);
	if (write (1, "ready\n", 6) != 6)
		return 1;
	__asm__ volatile ("ldmxcsr %[control]\n\tfldcw %[x87]\n\tfldl %[deep]\n\t" LOAD
			"mov %[general], %%r15\n"
			"1:\tpause\n\tcmpl $0, %[go]\n\tje 1b\n\t"
			"mov %%r15, %[kept]\n\t" STORE
			"fstpl %[deep_after]\n\tfnstcw %[x87_after]\n\tstmxcsr %[control_after]\n\t"
			: [kept] "=&r"(kept), [control_after] "=m"(control_after), [x87_after] "=m"(x87_after),
			[deep_after] "=m"(deep_after)
			: [in] "r"(before), [out] "r"(after), [masks] "r"(masks), [masks_out] "r"(masks_after),
			[control] "m"(control), [x87] "m"(x87), [deep] "m"(deep), [general] "r"(general), [go] "m"(go)
			: "r15", "memory");
	int same = kept == general && control_after == control && x87_after == x87 && deep_after == deep;
	same &= memcmp (before, after, VECTORS) == 0 && memcmp (masks, masks_after, MASKS) == 0;
	return write (1, same ? "well\n" : "ill\n", 5) != 5;
}
"""
_SETS = {"sse2": ("xmm", 16, 16), "avx": ("ymm", 16, 32), "avx512f": ("zmm", 32, 64)}


def _options(feature: str) -> list[str]:
    """What a compiler has to know of a set of vector registers."""
    name, count, width = _SETS[feature]
    move = "movups" if feature == "sse2" else "vmovups"
    load = [f"{move} {n * width}(%[in]), %%{name}{n}" for n in range(count)]
    store = [f"{move} %%{name}{n}, {n * width}(%[out])" for n in range(count)]
    masks = range(1, 8) if feature == "avx512f" else ()
    load += [f"kmovw {8 * n}(%[masks]), %%k{n}" for n in masks]
    store += [f"kmovw %%k{n}, {8 * n}(%[masks_out])" for n in masks]
    text = {
        word: '"' + "".join(f"{one}\\n\\t" for one in lines) + '"' for word, lines in (("LOAD", load), ("STORE", store))
    }
    sizes = {"VECTORS": str(count * width), "MASKS": str(64 if masks else 0)}
    return [f"-D{word}={value}" for word, value in (text | sizes).items()]


@pytest.mark.parametrize("feature", _SETS)
def test_registers_keep_every_bit(feature: str, tmp_path: Path) -> None:
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    if feature not in flags.split():
        pytest.skip(f"this CPU has no {feature}")
    source, binary, out = tmp_path / "holder.c", tmp_path / "holder", tmp_path / "out"
    source.write_text(_HOLDER)
    subprocess.run(["cc", "-O1", *_options(feature), "-o", binary, source], check=True)
    with out.open("wb") as stdout:
        program = subprocess.Popen([binary], stdin=subprocess.DEVNULL, stdout=stdout, start_new_session=True)
    pid = program.pid
    try:
        _wait_for(out, "ready\n")
        time.sleep(0.05)  # it has loaded them
        checkpoint, pages = take(program)
        remake(pid, checkpoint, pages)
        os.kill(pid, signal.SIGUSR1)
        _wait_for(out, "ready\nwell\n")
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _wait_for(out: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while out.read_text() != text:
        assert time.monotonic() < deadline, out.read_text()
        time.sleep(0.02)
