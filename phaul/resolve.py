"""`phaul resolve`: finish a migration that nobody works on, and say which copy goes on.

Both hosts' desks are asked; what is done on each is recovery's (recovery.py), and the rows decide. Only where no row
can, because the host that knows is gone, does the operator's word count (`--keep`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from phaul.config import Settings
from phaul.desk import Resolved, Standing, Visitor
from phaul.errors import ConnectError, InDoubtError, LostError, PhaulError, UsageError
from phaul.journal import Store
from phaul.migration import Message
from phaul.transport import hello, local, relay, ssh
from phaul.transport.ssh_config import Destination, SshOptions

_ANSWERED = ("prepared", "frozen", "aborted", "released")  # rows of a source that need no other host's answer


@dataclass(frozen=True)
class Verdict:
    """How it ended, in words for an operator: `outcome` as in the result of `phaul migrate`."""

    outcome: str
    text: str


@dataclass(frozen=True)
class Word:
    """The operator's: which copy goes on. `vouched` is asked when nobody else can decide, with what the operator has to
    be sure of; False leaves all as it is."""

    keep: str
    vouched: Callable[[str], bool]


async def resolve(migration: str, word: Word | None, settings: Settings) -> Verdict:
    """Finish one migration from the host that this runs on. InDoubtError if only `--keep` can."""
    async with local.start_agent(hello.local(relay.FEATURES)) as link:
        here = Visitor(link, "this host")
        for role in ("source", "destination"):
            standing = await here.journal(migration, role)
            if standing.state:
                break
        else:
            raise PhaulError(f"this host knows no migration {migration!r}", advice="phaul status --all lists them")
        if standing.owned and not standing.ended:
            raise PhaulError(
                f"the agent of migration {migration} is alive (pid {standing.owner}) and works on it",
                advice=f"wait, and look again: phaul status {migration}. If it hangs: kill -9 {standing.owner}, "
                "whose keeper then decides by itself",
            )
        if role == "destination":
            return await _at_destination(migration, word, here, standing)
        return await _at_source(migration, word, here, standing, settings)


def unfinished(settings: Settings) -> list[str]:
    """The migrations of this host that are not over, and that nobody works on."""
    store = Store(settings.agent.state_directory)
    found = []
    for name, role in store.names():
        journal = store.open(name, role)
        if journal is not None:
            with journal:
                if not journal.row.ended and not journal.row.owned:
                    found.append(name)
    return list(dict.fromkeys(found))


async def _at_destination(migration: str, word: Word | None, here: Visitor, standing: Standing) -> Verdict:
    """What this host's row says, which no operator overrules: a copy that never ran may be given up, that is all."""
    peer, asked = standing.peer or "the source", ""
    if word is not None and not standing.ended:
        if word.keep == "destination" or standing.state not in ("prepared", "parked", "discarded"):
            raise UsageError(
                f"--keep {word.keep} is not for this side: the program came here, and its row says {standing.state}",
                advice=f"phaul resolve {migration} here, without --keep, does what it says; --keep is for {peer}, "
                "where the frozen copy is",
            )
        asked = "ask"  # as if the source had: the copy here gives way
    done = await here.resolve(migration, "destination", asked, "")
    texts = {
        "migrated": f"the program runs here; the frozen copy on {peer} may go: phaul resolve {migration} there",
        "stayed": f"the copy here never ran and is gone; the program is on {peer}: phaul resolve {migration} there, if "
        "it is frozen there",
        "lost": f"this host went down after the program had gone on here, and the program with it. {peer} still holds "
        f"the copy from before: phaul resolve {migration} --keep source there goes on from that, without what was "
        "done here",
        "in-doubt": f"{done.why}. Nothing of it runs here. phaul resolve {migration} on {peer} can decide: with --keep "
        "source, if this host is not to go on with it",
    }
    return Verdict(done.outcome, texts.get(done.outcome, done.why))


async def _at_source(
    migration: str, word: Word | None, here: Visitor, standing: Standing, settings: Settings
) -> Verdict:
    peer, answer, silent, keep = standing.peer or "the destination", "", "", ""
    if standing.state not in _ANSWERED and not standing.ended:
        answer, silent = await _answer_there(migration, standing, settings)
        if answer not in (Message.RESUMED, Message.DISCARDED):
            if silent and word is None and standing.arbiter:
                done = await here.resolve(migration, "source", "", "")
                if done.outcome != "in-doubt":
                    return _verdict(done, standing, migration)
                silent = done.why
            if answer == Message.GONE and word is None:
                raise LostError(f"{peer}: {_WORDS[answer]}", migration=migration)
            keep = _word(migration, peer, word, silent or _WORDS[answer])
        elif word is not None and (word.keep == "destination") != (answer == Message.RESUMED):
            raise PhaulError(
                f"{peer} has decided otherwise: its copy {_WORDS[answer]}",
                advice=f"phaul resolve {migration}, without --keep, does what it decided",
            )
    done = await here.resolve(migration, "source", answer, keep)
    if done.outcome == "in-doubt" and not answer and not keep:  # this host went down; only now its row asks
        after = await here.journal(migration, "source")
        if after.state not in _ANSWERED:
            return await _at_source(migration, word, here, after, settings)
    telling = {"migrated": Message.RELEASED, "stayed": Message.ABORT}.get(done.outcome)
    if telling is not None and not silent:  # it need not remember any more
        with contextlib.suppress(PhaulError, OSError, TimeoutError):
            await _ask_there(migration, standing.peer, settings, telling)
    return _verdict(done, standing, migration)


async def _answer_there(migration: str, standing: Standing, settings: Settings) -> tuple[str, str]:
    """The destination's answer, or why there is none."""
    try:
        return await _ask_there(migration, standing.peer, settings), ""
    except (PhaulError, OSError, TimeoutError) as error:
        return "", str(error) or f"{standing.peer} does not answer"


def _word(migration: str, peer: str, word: Word | None, why: str) -> str:
    """Which copy goes on, by an operator who vouches for what nobody here can know. InDoubtError without."""
    if word is None:
        raise _needs_a_word(migration, peer, why)
    if not word.vouched(ASSERTIONS[word.keep].format(peer=peer, why=why)):
        raise _needs_a_word(migration, peer, why)
    return word.keep


ASSERTIONS = {
    "source": """\
{why}.
--keep source lets the frozen copy on this host run. It goes on from the moment of the switchover: whatever the program
did on {peer} after that is rolled back, and clients that saw it will find it undone.
If the program runs on {peer}, it will then run TWICE, on the same files and addresses. Be sure that it does not:
  {peer} is powered off, or has been booted or installed anew since; or you have looked there, and it is not running.
""",
    "destination": """\
{why}.
--keep destination kills the frozen copy on this host. If the program does not run on {peer}, it is LOST. Be sure:
  you have looked on {peer}, and it is running there (or what it did is all that counts, and it may be lost).
""",
}
"""What each word asserts, to be read before it is given."""


_WORDS: dict[str, str] = {
    Message.RESUMED: "runs",
    Message.DISCARDED: "never ran and is gone",
    Message.UNKNOWN: "it knows nothing of this migration: its journal is not the one it had",
    Message.DEAD: "it went down before it was decided whether the program goes on there",
    Message.GONE: "it went down after the program had gone on there, and the program with it",
}


def _needs_a_word(migration: str, peer: str, why: str) -> InDoubtError:
    return InDoubtError(
        f"nobody can say whether the program runs on {peer}: {why}",
        migration=migration,
        where="the copy on this host is frozen: it does not run, and nothing is lost",
        advice=(
            f"Best: bring {peer} back, then phaul resolve {migration}, which asks it and decides by itself.\n"
            f"  Else look on {peer} (console, ps) whether the program runs.\n"
            f"  It runs there:  phaul resolve {migration} --keep destination   kills the copy here\n"
            f"  It does not:    phaul resolve {migration} --keep source        lets the copy here run, from the moment "
            "of the switchover; what it did there since is rolled back"
        ),
    )


def _verdict(done: Resolved, standing: Standing, migration: str) -> Verdict:
    match done.outcome:
        case "migrated":
            return Verdict("migrated", f"it runs on {standing.peer}; the copy here is gone")
        case "stayed" | "cancelled":
            return Verdict("stayed", "it runs on here; nothing of it is left at the destination that could run")
        case "in-doubt":
            raise _needs_a_word(migration, standing.peer or "the destination", done.why)
        case outcome:
            return Verdict(outcome, done.why)


async def _ask_there(migration: str, peer: str, settings: Settings, word: str = "ask") -> str:
    """What the destination's row says, decided by being asked; or tell it something."""
    if not peer:
        raise ConnectError("the journal does not say how the destination is reached")
    async with ssh.connect(Destination.parse(peer), SshOptions.of(settings.ssh)) as connection:
        agent = await connection.start_agent(hello.local(relay.FEATURES))
        done = await Visitor(agent.link(), connection.name).resolve(migration, "destination", word, "")
        return done.answer
