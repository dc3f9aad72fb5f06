"""An active server that tries anything against honest clients, and never gets one site's update.

It shows each site any round, keys, boxes, lists and sums that it likes, in any order, again and
again, and may have a site on its side. What it holds is kept in books and judged after every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from protocols.bfv import Parameters, Sum
from protocols.catalogue import UPLOAD
from protocols.errors import ProtocolError
from protocols.identity import digest
from protocols.messages import (
    Begin,
    Confirmation,
    Confirmations,
    MaskAdvertisement,
    MaskAdvertisements,
    RelayedSecrets,
    ReleasedShares,
    SealedSeed,
    SealedShares,
    SharedSecrets,
    SumToOpen,
    Survivors,
    Upload,
)
from protocols.rounds import statement
from protocols.sealing import ChannelKey

SHAPES = ((5, 0), (4, 1), (6, 1))
"""Sites, and how many of them collude: where 2t = n + T + 1, so that no site is to spare."""
ALL = "abcdef"
SITES = st.sampled_from(ALL)
SETS = st.just(frozenset(ALL)) | st.frozensets(SITES)
NEARLY_ALL = st.frozensets(SITES, max_size=2).map(lambda out: frozenset(ALL) - out)
ANY = SETS | NEARLY_ALL


class ActiveServer(RuleBasedStateMachine):
    """The server's moves, and what they have brought it."""

    def __init__(self, small: Callable[..., Any], protocol: str) -> None:
        super().__init__()
        self.small, self.protocol = small, protocol

    @initialize(shape=st.sampled_from(SHAPES))
    def start(self, shape: tuple[int, int]) -> None:
        """Honest clients, waiting."""
        count, tolerated = shape
        self.game = self.small(self.protocol, ALL[:count], tolerated=tolerated, length=3)
        self.begin, self.tolerated = self.game.begin, tolerated
        self.sites = self.begin.cohort
        self.colluder = self.sites[-1] if tolerated else None
        self.honest = [site for site in self.sites if site != self.colluder]
        self.heard: list[tuple[str, bytes]] = []
        self.adverts: dict[str, list[MaskAdvertisement]] = {site: [] for site in self.sites}
        self.shown: dict[str, dict[str, MaskAdvertisement]] = {}
        self.boxes: dict[tuple[str, str], SealedShares] = {}
        self.seeds: dict[tuple[str, str], SealedSeed] = {}
        self.members: dict[str, frozenset[str]] = {}
        self.uploads: dict[str, Upload] = {}
        self.confirmed: dict[str, tuple[tuple[str, ...], Confirmation]] = {}
        self.released: dict[str, ReleasedShares] = {}
        self.opened: dict[str, SumToOpen] = {}

    # Asking

    def ask(self, site: str, phase: str, message: bytes) -> None:
        """Send `message`; whatever comes back is written down, and must have been right to say."""
        self.heard.append((phase, message))
        if site not in self.sites:
            return
        try:
            reply = self.game.answer(site, phase, message)
        except ProtocolError:
            return
        getattr(self, f"said_in_{phase}")(site, message, reply)

    def said_in_advertise(self, site: str, message: bytes, reply: bytes) -> None:
        """Keys are offered only where the thresholds hold, in the round that was expected."""
        begin = Begin.from_bytes(message)
        n, t, m = len(begin.cohort), begin.threshold, begin.minimum
        assert 2 * t > n + self.tolerated
        assert m >= max(t, self.tolerated + 2)
        assert (begin.round, begin.binding) == (self.begin.round, self.begin.binding)
        self.adverts[site].append(MaskAdvertisement.from_bytes(reply))

    def said_in_share(self, site: str, message: bytes, reply: bytes) -> None:
        """Shares go to at least the minimum, once."""
        items = MaskAdvertisements.from_bytes(message).items
        said = SharedSecrets.from_bytes(reply)
        assert site not in self.shown
        assert len(items) >= self.begin.minimum
        assert set(self.sites) >= {item.sender for item in items}
        self.shown[site] = {item.sender: item for item in items}
        self.boxes |= {(site, box.receiver): box for box in said.shares}
        self.seeds |= {(site, seed.receiver): seed for seed in said.seeds}
        assert not said.seeds or site == min(self.shown[site])

    def said_in_upload(self, site: str, message: bytes, reply: bytes) -> None:
        """One upload, under the masks of at least the minimum."""
        relayed = RelayedSecrets.from_bytes(message)
        assert site not in self.uploads
        self.members[site] = frozenset({site, *(box.sender for box in relayed.shares)})
        assert self.members[site] == set(relayed.members)
        assert len(self.members[site]) >= self.begin.minimum
        assert self.members[site] <= set(self.shown[site])
        self.uploads[site] = Upload.from_bytes(reply)

    def said_in_confirm(self, site: str, message: bytes, reply: bytes) -> None:
        """One U3, large enough, inside the site's own U2."""
        survivors = Survivors.from_bytes(message).sites
        assert site not in self.confirmed
        assert len(survivors) >= self.begin.minimum
        assert site in survivors
        assert set(survivors) <= self.members[site]
        self.confirmed[site] = survivors, Confirmation.from_bytes(reply)

    def said_in_unmask(self, site: str, message: bytes, reply: bytes) -> None:
        """One answer, after a quorum for the U3 that the site signed; one kind of share a peer."""
        said = ReleasedShares.from_bytes(reply)
        assert site not in self.released
        survivors, _ = self.confirmed[site]
        self.was_quorum(survivors, Confirmations.from_bytes(message).items)
        own, lost = ({item.owner for item in items} for items in (said.own, said.mask))
        assert own <= set(survivors)
        assert lost <= self.members[site] - set(survivors)
        self.released[site] = said

    def said_in_open(self, site: str, message: bytes, reply: bytes) -> None:
        """One opening, after a quorum for the U3 that the site signed."""
        del reply
        request = SumToOpen.from_bytes(message)
        assert site not in self.opened
        assert request.contributors == self.confirmed[site][0]
        assert len(request.contributors) >= self.begin.minimum
        self.was_quorum(request.contributors, request.confirmations)
        self.opened[site] = request

    def was_quorum(self, survivors: tuple[str, ...], items: Iterable[Confirmation]) -> None:
        """At least t sites in U3 really signed it."""
        signers = {item.sender for item in items}
        assert len(signers) >= self.begin.threshold
        assert signers <= set(survivors)
        for site in signers - {self.colluder}:
            assert self.confirmed[site][0] == survivors

    # What a server can build

    def confirmations(self, survivors: tuple[str, ...], signers: frozenset[str]) -> Any:
        """What it has of `signers`' signatures; a colluding site signs anything."""
        items = []
        for site in self.sites:
            if site in signers and site == self.colluder:
                listed = digest("survivors", *(name.encode() for name in survivors))
                text = statement(self.begin.context, "confirm", site, listed)
                items.append(Confirmation(site, self.game.identities[site].key.sign(text)))
            elif site in signers and site in self.confirmed:
                items.append(self.confirmed[site][1])
        return tuple(items)

    def named(self, names: frozenset[str]) -> tuple[str, ...]:
        """Those of `names` that are in the cohort, in order."""
        return tuple(site for site in self.sites if site in names)

    # The server's moves

    @rule(
        site=SITES,
        changes=st.fixed_dictionaries(
            {},
            optional={
                "minimum": st.integers(2, 6),
                "threshold": st.integers(1, 6),
                "round": st.integers(1, 2),
                "binding": st.sampled_from([bytes(32), b"\1" * 32]),
                "cohort": st.frozensets(SITES, min_size=2).map(lambda s: tuple(sorted(s))),
            },
        ),
    )
    def show_another_round(self, site: str, changes: dict[str, Any]) -> None:
        """Begin something, honest or not."""
        fields = {name: getattr(self.begin, name) for name in self.begin.__struct_fields__}
        fields |= changes
        self.ask(site, "advertise", msgspec.msgpack.encode(["Begin", *fields.values()]))

    @rule(sites=SETS)
    def begin_honestly(self, sites: frozenset[str]) -> None:
        """Begin the round."""
        for site in self.named(sites):
            self.ask(site, "advertise", self.begin.to_bytes())

    @rule()
    def collude_with_other_keys(self) -> None:
        """A colluding site signs a second pair of keys."""
        if self.colluder:
            channel, mask = (ChannelKey(self.game.entropy(self.colluder)).public for _ in "12")
            said = (channel, mask, bytes(32))
            text = statement(self.begin.context, "advertise", self.colluder, *said)
            signature = self.game.identities[self.colluder].key.sign(text)
            self.adverts[self.colluder].append(MaskAdvertisement(self.colluder, *said, signature))

    @rule(site=SITES, names=ANY, last=st.booleans(), swap=st.none() | SITES)
    def show_keys(self, site: str, names: frozenset[str], last: bool, swap: str | None) -> None:
        """Some of the keys, for one of them perhaps keys of its own."""
        items = []
        for name in self.named(names | {site}):
            if self.adverts[name]:
                item = self.adverts[name][-1 if last else 0]
                if name == swap:
                    own = ChannelKey(self.game.entropy(name)).public
                    item = msgspec.structs.replace(item, mask=own)
                items.append(item)
        if len(items) >= 2:
            self.ask(site, "share", MaskAdvertisements(tuple(items)).to_bytes())

    @rule(sites=SETS, names=ANY)
    def show_keys_alike(self, sites: frozenset[str], names: frozenset[str]) -> None:
        """The same U1 to many."""
        for site in self.named(sites):
            self.show_keys(site, names | sites, False, None)

    @rule(site=SITES, names=ANY, also=ANY)
    def relay(self, site: str, names: frozenset[str], also: frozenset[str]) -> None:
        """Some of the boxes, and a list of more; a colluding site's box may hold anything."""
        boxes = []
        for name in self.named(names - {site}):
            box = self.boxes.get((name, site))
            if box is None and name == self.colluder:
                box = SealedShares(name, site, bytes(94), bytes(32), bytes(32))
            if box is not None:
                boxes.append(box)
        if not boxes or site not in self.shown:
            return
        seed = self.seeds.get((min(self.shown[site]), site))
        seeds = (seed,) if seed and self.protocol == "masked-bfv" else ()
        members = tuple(sorted({site, *also, *(box.sender for box in boxes)}))
        if len(members) >= 2:
            self.ask(site, UPLOAD, RelayedSecrets(members, tuple(boxes), seeds).to_bytes())

    @rule(sites=SETS, names=ANY, also=st.just(frozenset()) | ANY)
    def relay_alike(
        self, sites: frozenset[str], names: frozenset[str], also: frozenset[str]
    ) -> None:
        """The same U2 to many."""
        for site in self.named(sites):
            self.relay(site, names, also)

    @rule(site=SITES, names=ANY)
    def show_survivors(self, site: str, names: frozenset[str]) -> None:
        """Any U3."""
        if len(survivors := self.named(names)) >= 2:
            self.ask(site, "confirm", Survivors(survivors).to_bytes())

    @rule(sites=SETS, names=ANY)
    def show_survivors_alike(self, sites: frozenset[str], names: frozenset[str]) -> None:
        """The same U3 to many."""
        for site in self.named(sites):
            self.show_survivors(site, names)

    @rule(site=SITES, signed_by=SITES, signers=ANY)
    def show_confirmations(self, site: str, signed_by: str, signers: frozenset[str]) -> None:
        """Any signatures that it has."""
        if signed_by in self.confirmed:
            items = self.confirmations(self.confirmed[signed_by][0], signers)
            if items:
                self.ask(site, "unmask", Confirmations(items).to_bytes())

    @rule(signed_by=SITES)
    def show_confirmations_alike(self, signed_by: str) -> None:
        """All signatures under one U3 to all."""
        if signed_by in self.confirmed:
            survivors = self.confirmed[signed_by][0]
            signers = {s for s, (theirs, _) in self.confirmed.items() if theirs == survivors}
            for site in self.sites:
                self.show_confirmations(site, signed_by, frozenset(signers | {self.colluder or ""}))

    @rule(site=SITES, signed_by=SITES, signers=ANY, added=ANY)
    def show_sum(
        self, site: str, signed_by: str, signers: frozenset[str], added: frozenset[str]
    ) -> None:
        """Any sum of what was uploaded, under any name."""
        if self.protocol != "masked-bfv" or signed_by not in self.confirmed:
            return
        survivors = self.confirmed[signed_by][0]
        encoding = self.game.encoding
        total = Sum(
            encoding.slots(self.game.length), Parameters(encoding.plain_bits, encoding.cohort)
        )
        for name in self.named(added):
            if name in self.uploads:
                total.add(self.uploads[name].payload)
        items = self.confirmations(survivors, signers)
        self.ask(site, "open", SumToOpen(survivors, items, total.to_bytes()).to_bytes())

    @rule(site=SITES, at=st.integers(0, 10**6), phase=st.none() | st.sampled_from(["confirm"]))
    def replay(self, site: str, at: int, phase: str | None) -> None:
        """Anything sent before, to anyone, in its phase or in another one."""
        if self.heard:
            was, message = self.heard[at % len(self.heard)]
            self.ask(site, phase or was, message)

    # What it must never hold

    def shares_of(self, owner: str, kind: str) -> set[str]:
        """Whose shares of the seed ("own") or of the mask secret ("mask") of `owner` it has."""
        held = {
            site
            for site, said in self.released.items()
            if owner in {item.owner for item in getattr(said, kind)}
        }
        if self.colluder and (owner, self.colluder) in self.boxes:
            held.add(self.colluder)
        return held

    def known(self, owner: str, kind: str) -> bool:
        """Whether it can recover that secret of `owner`."""
        if owner == self.colluder:
            return True
        return len(self.shares_of(owner, kind)) >= self.begin.threshold

    @invariant()
    def no_site_is_released_both_ways(self) -> None:
        """Nobody's seed and mask secret are both recovered; no honest site gives both shares."""
        for owner in self.honest:
            assert not (self.known(owner, "own") and self.known(owner, "mask"))
            both = self.shares_of(owner, "own") & self.shares_of(owner, "mask")
            assert both <= {self.colluder}

    @invariant()
    def one_u3_is_confirmed_by_a_quorum(self) -> None:
        """Two different U3 never both reach t signatures."""
        signers: dict[tuple[str, ...], int] = {}
        for site, (survivors, _) in self.confirmed.items():
            if site != self.colluder:
                signers[survivors] = signers.get(survivors, 0) + 1
        enough = [s for s, n in signers.items() if n + self.tolerated >= self.begin.threshold]
        assert len(enough) <= 1

    @invariant()
    def no_sum_is_smaller_than_the_minimum(self) -> None:
        """Whatever set of uploads it can take all masks off has at least m - T honest ones.

        From each upload follow the pair masks that it cannot rebuild: they cancel only against an
        upload of the same U2 and keys whose self mask is known.
        """
        for site in self.honest:
            group, heap, open_ = set[str](), [site], True
            while heap and open_:
                one = heap.pop()
                if one in group:
                    continue
                group.add(one)
                open_ = one in self.uploads and self.known(one, "own")
                if not open_:
                    break
                for peer in self.members[one] - {one, self.colluder}:
                    if not (self.known(one, "mask") or self.known(peer, "mask")):
                        open_ = open_ and self.under(one) == self.under(peer)
                        heap.append(peer)
            assert not open_ or len(group) >= self.begin.minimum - self.tolerated

    def under(self, site: str) -> Any:
        """What the masks of a site's upload are bound to."""
        if site not in self.uploads:
            return None
        return {name: self.shown[site][name] for name in self.members[site]}


@pytest.mark.parametrize("protocol", ["secagg", "masked-bfv"])
def test_an_active_server_never_gets_past_the_masks(
    protocol: str, small: Callable[..., Any]
) -> None:
    """No both shares, no second signature, answer or opening, no sum below the minimum."""
    run_state_machine_as_test(
        lambda: ActiveServer(small, protocol),
        settings=settings(max_examples=150, stateful_step_count=25),
    )


@pytest.mark.parametrize("protocol", ["secagg", "masked-bfv"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_books_see_a_sum_that_was_unmasked(
    protocol: str, shape: tuple[int, int], small: Callable[..., Any]
) -> None:
    """An honest round through the same moves: shares of everyone, and exactly one sum."""
    machine = ActiveServer(small, protocol)
    everyone = frozenset(ALL)
    machine.start(shape)
    machine.begin_honestly(everyone)
    machine.show_keys_alike(everyone, everyone)
    machine.relay_alike(everyone, everyone, frozenset())
    assert set(machine.uploads) == set(machine.sites)
    machine.show_survivors_alike(everyone, everyone - {"b"})
    machine.show_confirmations_alike("a")
    assert set(machine.released) == set(machine.sites) - {"b"}
    assert machine.known("a", "own")
    assert machine.known("b", "mask")
    assert not machine.known("a", "mask") or machine.colluder == "a"
    assert not machine.known("b", "own")
    machine.no_site_is_released_both_ways()
    machine.no_sum_is_smaller_than_the_minimum()
    # A server that could recover two more secrets would be caught.
    machine.known = lambda owner, kind: True  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        machine.no_sum_is_smaller_than_the_minimum()
    with pytest.raises(AssertionError):
        machine.no_site_is_released_both_ways()
