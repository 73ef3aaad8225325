#!/usr/bin/env python3
"""Turn a binary file into a C array: embed.py INPUT OUTPUT NAME."""

import sys
from pathlib import Path


def main() -> None:
    source, target, name = sys.argv[1:4]
    data = Path(source).read_bytes()
    rows = (data[i : i + 16] for i in range(0, len(data), 16))
    body = "\n".join("  " + "".join(f"0x{byte:02x}," for byte in row) for row in rows)
    Path(target).write_text(
        f"#include <stddef.h>\nextern const unsigned char {name}[];\nextern const size_t {name}_size;\n"
        f"const unsigned char {name}[] __attribute__((aligned(64))) = {{\n{body}\n}};\n"
        f"const size_t {name}_size = {len(data)};\n"
    )


main()
