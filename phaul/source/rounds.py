"""Rounds: their numbers, and when to stop copying: the convergence policy, a pure function of what they have shown.

A freeze now would cost the pages that are dirty over the measured bandwidth, and a fixed part measured in this very
run. Rounds go on until that is below the limit. Below it they still go on while each at least halves what is left and
the transfer dominates: such rounds are short, and each makes the freeze shorter. Above it they go on as long as there
is something left to send; where the fixed part alone is above the limit, more rounds change nothing, and it is only
measured again: on a busy host one survey says little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phaul.migration import Verdict

PAGE = 4096
_HOPELESS = 10.0  # times the limit: then a switchover is not what was asked for
_PROGRESS = 0.9  # a round helps if it leaves less than this part of what the best one before left
_WINDOW = 3  # rounds without progress before copying on is pointless
_POLISH = 0.5
_REST = 0.1  # part of the fixed part: fewer pages than this takes are not worth a round


@dataclass(frozen=True)
class Passed:
    """One round: what was sent and how long that took, and how many pages were dirty when it was over. `haul` is how
    many seconds the files would take that were touched by then."""

    pages: int
    bytes: int
    seconds: float
    dirty: int
    haul: float = 0.0


@dataclass(frozen=True)
class Wanted:
    """What was asked for. `max_downtime` in seconds, `bandwidth` in bytes a second, 0 for no limit."""

    max_downtime: float
    max_rounds: int
    bandwidth: int = 0
    auto_converge: bool = False


@dataclass(frozen=True)
class Decision:
    """What to do, why, and the seconds that a freeze now would take."""

    verdict: Verdict
    predicted: float
    why: str = ""
    throttle: bool = False


def rate(history: Sequence[Passed], wanted: Wanted) -> float:
    """Bytes a second that pages travel at, as pages in memory: the best of the rounds that were long enough to tell."""
    telling = [one for one in history if one.seconds > 0 and one.pages] or [Passed(1, PAGE, 1e-3, 0)]
    longest = max(one.pages for one in telling)
    best = max(PAGE * one.pages / one.seconds for one in telling if one.pages >= longest / 16)
    ratio = sum(PAGE * one.pages for one in telling) / max(1, sum(one.bytes for one in telling))
    return min(best, wanted.bandwidth * max(1.0, ratio)) if wanted.bandwidth else best


def predict(history: Sequence[Passed], fixed: float, wanted: Wanted) -> float:
    """The seconds that a freeze now would take."""
    return fixed + PAGE * history[-1].dirty / rate(history, wanted) + history[-1].haul


class Numbers:
    """Of rounds on the wire, where those that a freeze has sent count too. One may be announced before it begins."""

    def __init__(self) -> None:
        self._begun = self._announced = 0  # how many

    @property
    def last(self) -> int:
        """The number of the last that has begun."""
        return self._begun - 1

    @property
    def pending(self) -> bool:
        """Whether one has been announced that has not begun."""
        return self._announced > self._begun

    def announce(self, tell: Callable[[int], None]) -> None:
        """Tell the number of the next, if that has not been done."""
        if not self.pending:
            tell(self._announced)
            self._announced += 1

    def begin(self, tell: Callable[[int], None]) -> int:
        """The next begins, announced by now; its number."""
        self.announce(tell)
        self._begun = self._announced
        return self.last


def decide(history: Sequence[Passed], fixed: float, wanted: Wanted) -> Decision:
    """After each round. `history` has at least one, `fixed` is the part of the downtime that no round changes."""
    predicted = predict(history, fixed, wanted)
    if predicted <= wanted.max_downtime:
        if _worth_polishing(history, fixed, predicted) and len(history) < wanted.max_rounds:
            return Decision(Verdict.ANOTHER, predicted, "each round still halves what is left")
        return Decision(Verdict.SWITCH, predicted)
    if len(history) >= wanted.max_rounds:
        if predicted > _HOPELESS * wanted.max_downtime:
            return Decision(Verdict.GIVE_UP, predicted, _words(predicted, wanted, f"after {len(history)} rounds"))
        return Decision(Verdict.SWITCH, predicted, f"{len(history)} rounds are the limit")
    if predicted - fixed <= _REST * fixed:
        if predicted > _HOPELESS * wanted.max_downtime:
            if len(history) < _WINDOW:
                return Decision(Verdict.ANOTHER, predicted, "what takes so long is measured again")
            return Decision(Verdict.GIVE_UP, predicted, _words(predicted, wanted, "with next to nothing to send"))
        return Decision(Verdict.SWITCH, predicted, "next to nothing is left to send: another round does not help")
    if _stuck(history):
        why = f"{_WINDOW} rounds have not made it less"
        return Decision(Verdict.ANOTHER, predicted, why, throttle=wanted.auto_converge)
    return Decision(Verdict.ANOTHER, predicted)


def _worth_polishing(history: Sequence[Passed], fixed: float, predicted: float) -> bool:
    if predicted - fixed <= fixed:
        return False
    return len(history) < 2 or history[-1].dirty <= _POLISH * history[-2].dirty


def _stuck(history: Sequence[Passed]) -> bool:
    if len(history) <= _WINDOW:
        return False
    best = min(one.dirty for one in history[:-_WINDOW])
    return all(one.dirty >= _PROGRESS * best for one in history[-_WINDOW:])


def _words(predicted: float, wanted: Wanted, when: str) -> str:
    return (
        f"it does not converge: a freeze would still take {predicted * 1000:.0f} ms {when}, "
        f"and {wanted.max_downtime * 1000:.0f} ms is the limit"
    )
