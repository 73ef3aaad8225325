"""The convergence policy on programs that dirty memory at a steady rate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul.migration import Verdict
from phaul.source.rounds import PAGE, Decision, Numbers, Passed, Wanted, decide, predict

WANTED = Wanted(max_downtime=0.1, max_rounds=30)


def simulate(heap: int, dirty_rate: float, link: float, wanted: Wanted = WANTED) -> list[tuple[Passed, Decision]]:
    """Rounds over a program that writes `dirty_rate` pages a second all over its heap; the link carries `link`."""
    history: list[Passed] = []
    decided: list[tuple[Passed, Decision]] = []
    pages = heap
    while not decided or decided[-1][1].verdict is Verdict.ANOTHER:
        seconds = max(pages, 1) * PAGE / link
        dirty = min(heap, int(dirty_rate * seconds))
        history.append(Passed(pages, PAGE * pages, seconds, dirty))
        decided.append((history[-1], decide(history, 0.002, wanted)))
        pages = dirty
    return decided


def test_an_idle_program_needs_one_round() -> None:
    rounds = simulate(1 << 18, 0, 1e9)
    assert len(rounds) == 1
    assert rounds[-1][1] == Decision(Verdict.SWITCH, 0.002)


def test_a_writer_slower_than_the_link_converges_below_the_limit() -> None:
    rounds = simulate(1 << 20, 25_000, 1e9)
    assert rounds[-1][1].verdict is Verdict.SWITCH
    assert rounds[-1][1].predicted < 0.01, "rounds that halve what is left go on below the limit"


def test_a_writer_faster_than_the_link_is_not_switched_over_at_any_price() -> None:
    rounds = simulate(1 << 20, 1e6, 1e9)
    last = rounds[-1][1]
    assert (last.verdict, len(rounds)) == (Verdict.GIVE_UP, WANTED.max_rounds)
    assert "does not converge" in last.why
    assert "100 ms" in last.why


def test_a_little_above_the_limit_is_taken_when_rounds_are_used_up() -> None:
    wanted = Wanted(max_downtime=0.1, max_rounds=4)
    history = [Passed(100_000, PAGE * 100_000, 0.4, 60_000)] * 4
    assert decide(history, 0.002, wanted).verdict is Verdict.SWITCH


def test_rounds_that_send_nothing_do_not_go_on() -> None:
    history = [Passed(10_000, PAGE * 10_000, 0.1, 0)]
    assert decide(history, 0.128, WANTED).verdict is Verdict.SWITCH
    assert decide(history, 2.0, WANTED).verdict is Verdict.ANOTHER, "one survey that took long says little"
    assert decide(history * 3, 2.0, WANTED).verdict is Verdict.GIVE_UP


def test_only_who_asked_for_it_is_throttled() -> None:
    history = [Passed(100_000, PAGE * 100_000, 0.4, 100_000)] * 5
    assert not decide(history, 0.002, WANTED).throttle
    assert decide(history, 0.002, Wanted(0.1, 30, auto_converge=True)).throttle


def test_a_bandwidth_limit_is_believed() -> None:
    history = [Passed(100_000, PAGE * 100_000, 0.1, 10_000)]
    limited = Wanted(0.1, 30, bandwidth=PAGE * 10_000)
    assert predict(history, 0.0, limited) == pytest.approx(1.0)
    assert predict(history, 0.0, WANTED) == pytest.approx(0.01)


def test_compression_stretches_a_bandwidth_limit() -> None:
    history = [Passed(100_000, PAGE * 25_000, 1.0, 10_000)]
    assert predict(history, 0.0, Wanted(0.1, 30, bandwidth=PAGE * 10_000)) == pytest.approx(0.25)


passed = st.builds(
    Passed,
    pages=st.integers(0, 1 << 30),
    bytes=st.integers(0, 1 << 42),
    seconds=st.floats(0, 1e5),
    dirty=st.integers(0, 1 << 30),
)


@given(history=st.lists(passed, min_size=1, max_size=40), fixed=st.floats(0, 10), limit=st.floats(1e-3, 60))
def test_it_always_ends_and_never_switches_early(history: list[Passed], fixed: float, limit: float) -> None:
    wanted = Wanted(max_downtime=limit, max_rounds=30)
    decision = decide(history, fixed, wanted)
    assert decision.predicted >= fixed
    if len(history) >= 30:
        assert decision.verdict is not Verdict.ANOTHER
    elif decision.verdict is Verdict.SWITCH:
        assert decision.predicted <= limit or decision.predicted <= 1.1 * fixed + 1e-9
    elif decision.verdict is Verdict.GIVE_UP:
        assert decision.predicted > 10 * limit
    else:
        assert decision.verdict is Verdict.ANOTHER


@given(heap=st.integers(1, 1 << 24), dirty=st.floats(0, 1e7), link=st.floats(1e6, 1e10))
def test_every_steady_program_is_decided(heap: int, dirty: float, link: float) -> None:
    rounds = simulate(heap, dirty, link)
    assert len(rounds) <= WANTED.max_rounds
    if rounds[-1][1].verdict is Verdict.GIVE_UP:
        assert dirty * PAGE * 2 > link, "a program half as fast as the link converges"


def test_a_round_is_announced_once_and_before_it_begins() -> None:
    numbers, told = Numbers(), list[int]()
    assert numbers.begin(told.append) == numbers.last == 0
    assert told == [0]
    numbers.announce(told.append)
    numbers.announce(told.append)
    assert (told, numbers.last, numbers.pending) == ([0, 1], 0, True)
    assert numbers.begin(told.append) == numbers.last == 1
    assert (told, numbers.pending) == ([0, 1], False)
    assert numbers.begin(told.append) == 2
    assert told == [0, 1, 2]


def test_a_round_that_cannot_be_announced_has_not_been() -> None:
    def lost(number: int) -> None:
        raise OSError(104, "cut")

    numbers, told = Numbers(), list[int]()
    with pytest.raises(OSError, match="cut"):
        numbers.announce(lost)
    assert not numbers.pending
    assert numbers.begin(told.append) == 0
    assert told == [0]
