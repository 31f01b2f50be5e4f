"""Sites in this process and a courier that knocks at their doors, honest or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedlora.callbacks import Callback
from fedlora.engines.courier import Arrived, Courier
from fedlora.engines.rules import Limits, Share, SiteConfig
from fedlora.engines.site import Site

Trick = Callable[[str, bytes, bytes | None], bytes | Arrived | None]
"""What becomes of an answer: the site's name, the letter, the answer, what arrives instead (None: nothing yet)."""


def shared_sites(folder: Path, count: int, limits: Limits = Limits()) -> dict[str, Site]:  # noqa: B008
    """Sites that share the clients of the server's partition."""
    return {
        f"site-{number}": Site(
            SiteConfig(
                name=f"site-{number}",
                share=Share(number=number, of=count),
                state=str(folder / f"site-{number}"),
                limits=limits,
            )
        )
        for number in range(count)
    }


class Post(Courier):
    """Answers come in the reverse order of letters, so that nothing may depend on it.

    Args:
        sites: by name.
        trick: what becomes of each answer.
    """

    def __init__(self, sites: Mapping[str, Site], trick: Trick | None = None) -> None:
        self.homes = dict(sites)
        self.trick = trick
        self.away: set[str] = set()
        self.sent: list[bytes] = []
        self.waiting: dict[str, tuple[str, bytes]] = {}
        self.answers: dict[str, bytes | None] = {}

    def sites(self) -> Mapping[str, int]:
        return {name: number for number, name in enumerate(sorted(self.homes)) if name not in self.away}

    def post(self, address: int, raw: bytes, seconds: float) -> str | None:
        assert seconds > 0
        name = sorted(self.homes)[address]
        if name in self.away:
            return None
        self.sent.append(raw)
        ticket = f"t{len(self.sent)}"
        self.waiting[ticket] = name, raw
        return ticket

    def collect(self, tickets: Sequence[str]) -> list[Arrived]:
        done = []
        for ticket in reversed([one for one in tickets if one in self.waiting]):
            name, raw = self.waiting[ticket]
            if name in self.away:
                done.append(Arrived(ticket, None, "its process died", again=True))
                del self.waiting[ticket]
                continue
            if ticket not in self.answers:
                self.answers[ticket] = self.homes[name].answer(raw)
            answer = self.answers[ticket]
            found = self.trick(name, raw, answer) if self.trick else answer
            if found is None:
                continue
            del self.waiting[ticket]
            done.append(found._replace(ticket=ticket) if isinstance(found, Arrived) else Arrived(ticket, found))
        return done


class Told(Callback):
    """Keeps the messages of a run."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)
