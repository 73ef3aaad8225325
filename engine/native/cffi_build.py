"""Generate the cffi extension's C source: cffi_build.py OUTPUT HEADER...

What stands between the lines `/* cffi: begin */` and `/* cffi: end */` of each
public header is the module's interface.
"""

import re
import sys
from pathlib import Path

from cffi import FFI

SECTION = re.compile(r"/\* cffi: begin \*/(.*?)/\* cffi: end \*/", re.DOTALL)


def main() -> None:
    output, *headers = sys.argv[1:]
    ffi = FFI()
    for header in headers:
        for section in SECTION.findall(Path(header).read_text()):
            ffi.cdef(section)
    includes = "\n".join(f'#include "{Path(header).name}"' for header in headers)
    ffi.set_source("phaul_engine._native", includes, py_limited_api=True)
    ffi.emit_c_code(output)


main()
