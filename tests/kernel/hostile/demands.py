"""What hostile images of `subject` say: each with what it is refused with, and how whole images become it."""

from __future__ import annotations

from collections.abc import Iterator

from tests.kernel.hostile.breaking import Break
from tests.kernel.hostile.files import FILES
from tests.kernel.hostile.memory import MEMORY
from tests.kernel.hostile.objects import OBJECTS, SOCKETS
from tests.kernel.hostile.tree import THREAD, TREE

ALL = {"tree": TREE, "thread": THREAD, "memory": MEMORY, "files": FILES, "objects": OBJECTS, "sockets": SOCKETS}


def cases() -> Iterator[tuple[str, str, Break]]:
    """Name, what it is refused with (a pattern), and what makes it."""
    for group, some in ALL.items():
        for name, (refusal, make) in some.items():
            yield f"{group}: {name}", refusal, make
