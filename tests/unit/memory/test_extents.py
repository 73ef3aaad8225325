"""Lists of runs against a model that has one entry a page."""

from __future__ import annotations

from typing import TypeAlias

from hypothesis import given
from hypothesis import strategies as st
from phaul_engine.memory.areas import Range, within
from phaul_engine.memory.extents import PAGE_SIZE, Extent, Extents, Kind

_EXTENT = st.builds(
    lambda page, pages, kind: Extent(page * PAGE_SIZE, pages, kind),
    st.integers(0, 60),
    st.integers(1, 12),
    st.sampled_from(Kind),
)


def _pages(extents: Extents) -> list[tuple[int, Kind]]:
    return [(extent.start // PAGE_SIZE + page, extent.kind) for extent in extents for page in range(extent.pages)]


@given(st.lists(_EXTENT, max_size=20))
def test_unite_keeps_each_page_once_by_its_lowest_kind(extents: list[Extent]) -> None:
    model: dict[int, Kind] = {}
    for start, pages, kind in extents:
        for page in range(start // PAGE_SIZE, start // PAGE_SIZE + pages):
            model[page] = min(kind, model.get(page, kind))
    united = Extents(extents)
    united.unite()
    assert _pages(united) == sorted(model.items())
    for one, two in zip(list(united), list(united)[1:], strict=False):
        assert one.kind != two.kind or one.start + one.pages * PAGE_SIZE < two.start


@given(st.lists(_EXTENT, max_size=20))
def test_a_list_keeps_what_is_added(extents: list[Extent]) -> None:
    added = Extents(extents)
    wanted = [(one.start // PAGE_SIZE + page, one.kind) for one in extents for page in range(one.pages)]
    assert _pages(added) == wanted
    assert [added.pages(kind) for kind in Kind] == [sum(1 for _, one in wanted if one is kind) for kind in Kind]


def test_a_run_longer_than_an_extent_can_be_is_split() -> None:
    extents = Extents([Extent(0, (1 << 32) + 5, Kind.DROP)])
    assert [one.pages for one in extents] == [(1 << 32) - 1, 6]
    assert extents.pages() == (1 << 32) + 5


_Drawn: TypeAlias = list[tuple[int, int, int]]
_RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8), st.integers(0, 2)), max_size=8)


def _ranges(drawn: _Drawn) -> list[Range]:
    ranges: list[Range] = []
    at = 0
    for gap, pages, origin in drawn:
        start = at + gap % 4 * PAGE_SIZE
        at = start + pages * PAGE_SIZE
        ranges.append(Range(start, at, 0, (origin, 0, 0)))
    return ranges


@given(_RANGES, _RANGES)
def test_parts_of_ranges_within_stretches(ranges: _Drawn, stretches: _Drawn) -> None:
    def pages(ranges: list[Range]) -> dict[int, tuple[int, int, int]]:
        return {page: one.origin for one in ranges for page in range(one.start, one.end, PAGE_SIZE)}

    known, wanted = pages(_ranges(ranges)), pages(_ranges(stretches))
    parts = within(_ranges(ranges), [(one.start, one.end) for one in _ranges(stretches)])
    assert parts == sorted(parts)
    assert pages(parts) == {page: origin for page, origin in known.items() if page in wanted}
