"""Where trees that have come are until they get their names, after the commit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Places:
    """For whoever makes what lives on them."""

    staged: tuple[tuple[str, str], ...] = ()  # final, and where it is now

    def __bool__(self) -> bool:
        return bool(self.staged)

    def now(self, path: str) -> str:
        """Where a path of a tree is now."""
        for final, staged in self.staged:
            if path == final or path.startswith(f"{final}/"):
                return staged + path[len(final) :]
        return path

    def command(self, *words: str) -> list[str]:
        """A command that sees the trees under their final names: it runs in a mount namespace of its own
        (unshare(1))."""
        if not self.staged:
            return list(words)
        script = 'n=$1; shift; while [ "$n" -gt 0 ]; do mount --bind "$1" "$2" || exit; shift 2; n=$((n-1)); done; '
        pairs = [path for final, staged in self.staged for path in (staged, final)]
        shell = ["sh", "-c", f'{script}exec "$@"', "sh", str(len(self.staged)), *pairs]
        return ["unshare", "--mount", "--propagation", "slave", *shell, *words]


NOWHERE = Places()
"""All is where it will be."""
