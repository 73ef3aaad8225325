"""The document is what the machine does."""

from pathlib import Path

from phaul.migration import Message, docs, states

DOCUMENT = Path(__file__).parents[3] / "docs" / "protocol.md"


def test_the_document_is_current() -> None:
    assert DOCUMENT.read_text() == docs.text(), "run: python -m phaul.migration > docs/protocol.md"


def test_every_state_and_message_is_in_it() -> None:
    text = docs.text()
    for state in states():
        assert f"### {state.__name__}\n" in text
    for message in Message:
        assert f"| {message} |" in text
