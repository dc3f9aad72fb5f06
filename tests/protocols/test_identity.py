"""Identities: pinned Ed25519 keys, and digests without collisions."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from protocols.errors import ProtocolError
from protocols.identity import Identity, Roster, SigningKey, digest
from protocols.rounds import make_identities, statement

# RFC 8032, section 7.1, test 2.
RFC_SECRET = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
RFC_PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
RFC_SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)
KEY = SigningKey(lambda n: RFC_SECRET[:n])
OTHER = SigningKey(bytes)
ROSTER = Roster({"b": OTHER.public, "a": KEY.public})


def test_signatures_are_those_of_rfc8032() -> None:
    """Known public key and signature; the cryptography library verifies them."""
    assert KEY.public == RFC_PUBLIC
    assert KEY.sign(b"\x72") == RFC_SIGNATURE
    Ed25519PublicKey.from_public_bytes(KEY.public).verify(KEY.sign(b"said"), b"said")


def test_the_roster_accepts_what_its_site_signed() -> None:
    """A good signature is accepted in silence."""
    ROSTER.verify("a", KEY.sign(b"said"), b"said")
    ROSTER.verify("b", OTHER.sign(b""), b"")


@pytest.mark.parametrize(
    ("site", "signature", "said"),
    [
        ("a", OTHER.sign(b"said"), b"said"),
        ("b", KEY.sign(b"said"), b"said"),
        ("a", KEY.sign(b"said"), b"say"),
        ("a", KEY.sign(b"said")[:-1], b"said"),
        ("a", KEY.sign(b"said") + b"\0", b"said"),
        ("a", b"", b"said"),
        ("a", bytes(64), b"said"),
        ("c", KEY.sign(b"said"), b"said"),
        ("", KEY.sign(b"said"), b"said"),
    ],
)
def test_the_roster_refuses_everything_else(site: str, signature: bytes, said: bytes) -> None:
    """Another key, another statement, another length, a stranger: the claimed site is named."""
    with pytest.raises(ProtocolError) as caught:
        ROSTER.verify(site, signature, said)
    assert caught.value.culprits == (site,)


def test_a_pinned_key_that_is_no_point_verifies_nothing() -> None:
    """32 bytes that are no Ed25519 key end in ProtocolError, not in a library's error."""
    roster = Roster({"a": b"\xff" * 32})
    with pytest.raises(ProtocolError):
        roster.verify("a", KEY.sign(b"said"), b"said")


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_roster_refuses_keys_of_another_length(size: int) -> None:
    """The caller's mistake: the site and the length are named."""
    with pytest.raises(ValueError, match=rf"clinic.*{size}"):
        Roster({"clinic": bytes(size)})


def test_a_roster_is_ordered_and_cannot_be_changed() -> None:
    """Name order whatever the order given; later changes of the source do not reach it."""
    source = {"b": OTHER.public, "a": KEY.public}
    roster = Roster(source)
    source["c"] = bytes(32)
    assert list(roster) == ["a", "b"]
    assert len(roster) == 2
    assert "a" in roster
    assert "c" not in roster
    with pytest.raises(TypeError):
        roster.keys["c"] = bytes(32)  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        roster.keys = {}  # type: ignore[misc]


def test_an_identity_needs_its_own_pinned_key() -> None:
    """A name that the roster lacks, or pins to another key, is refused by name."""
    assert Identity("a", KEY, ROSTER).name == "a"
    with pytest.raises(ValueError, match="of b"):
        Identity("b", KEY, ROSTER)
    with pytest.raises(ValueError, match="of c"):
        Identity("c", KEY, ROSTER)


def test_a_signing_key_is_never_shown_nor_serialised() -> None:
    """Redacted alone and inside an identity; no pickle; no bytes."""
    assert repr(KEY) == str(KEY) == "SigningKey(<secret>)"
    assert RFC_SECRET.hex()[:8] not in repr(Identity("a", KEY, ROSTER))
    assert not hasattr(KEY, "to_bytes")
    for secret in (KEY, Identity("a", KEY, ROSTER)):
        with pytest.raises(TypeError):
            pickle.dumps(secret)


@given(st.text("abc ", max_size=5), st.lists(st.binary(max_size=5), max_size=4), st.data())
def test_digests_of_other_fields_differ(
    domain: str, fields: list[bytes], data: st.DataObject
) -> None:
    """Moving a boundary, splitting, merging, or moving a field into the domain changes it."""
    mine = digest(domain, *fields)
    assert len(mine) == 32
    assert digest(domain, *fields, b"") != mine
    assert digest(domain + "x", *fields) != mine
    assert digest(domain, b"".join(fields)) != mine or len(fields) == 1
    if fields:
        i = data.draw(st.integers(0, len(fields) - 1))
        cut = data.draw(st.integers(0, len(fields[i])))
        split = [*fields[:i], fields[i][:cut], fields[i][cut:], *fields[i + 1 :]]
        assert digest(domain, *split) != mine


def test_statements_differ_in_every_part() -> None:
    """Round, phase, sender and content, and the boundaries between them, are all bound."""
    said = [
        statement(b"r1", "upload", "a", b"x"),
        statement(b"r2", "upload", "a", b"x"),
        statement(b"r1", "open", "a", b"x"),
        statement(b"r1", "upload", "b", b"x"),
        statement(b"r1", "upload", "a", b"y"),
        statement(b"r1", "upload", "a", b"x", b""),
        statement(b"r1", "upload", "ax", b""),
        statement(b"r1u", "pload", "a", b"x"),
    ]
    assert len(set(said)) == len(said)


def test_fresh_identities_pin_each_other() -> None:
    """One roster of all names, distinct keys, name order, whatever the order given."""
    identities = make_identities(["c", "a", "b"], SeedStream().bytes)
    assert list(identities["a"].roster) == ["a", "b", "c"]
    assert len({identity.key.public for identity in identities.values()}) == 3
    for name, identity in identities.items():
        identity.roster.verify(name, identity.key.sign(b"x"), b"x")


class SeedStream:
    """Counts up, so that every draw differs."""

    def __init__(self) -> None:
        self.draws = 0

    def bytes(self, size: int) -> bytes:
        """The next `size` bytes."""
        self.draws += 1
        return digest("stream", self.draws.to_bytes(4, "big"))[:size]
