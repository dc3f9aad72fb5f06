"""Sealed seeds: only the named receiver opens them, in their own context, unchanged."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.errors import ProtocolError
from protocols.keystream import Keystream, Seed
from protocols.sealing import ChannelKey, box_bytes, seal, unseal

SEED = Seed(bytes(range(64)))
CONTEXT = b"maker, receiver, keys, session, round"
MAKER, RECEIVER, OTHER = (
    ChannelKey(Keystream(Seed(bytes([i]) * 32), "channel").bytes) for i in range(3)
)


def sealed(seed: Seed = SEED, context: bytes = CONTEXT) -> bytes:
    """`seed` from the maker to the receiver."""
    rand = Keystream(Seed(bytes(32)), "nonce").bytes
    return seal(seed, MAKER, ("receiver", RECEIVER.public), context, rand)


@pytest.mark.parametrize("size", [32, 64])
def test_the_receiver_opens_what_was_sealed(size: int) -> None:
    """Both seed sizes come back equal, in boxes of the stated length."""
    seed = Seed(bytes(range(size)))
    box = sealed(seed)
    assert len(box) == box_bytes(size)
    assert unseal(box, RECEIVER, ("maker", MAKER.public), CONTEXT) == seed


def test_a_box_shows_nothing_of_the_seed() -> None:
    """The seed's bytes are not in the box, and a fresh nonce gives an unrelated box."""
    assert bytes(range(64))[:8] not in sealed()
    rand = Keystream(Seed(b"\1" * 32), "nonce").bytes
    again = seal(SEED, MAKER, ("receiver", RECEIVER.public), CONTEXT, rand)
    same = sum(a == b for a, b in zip(again, sealed(), strict=True))
    assert same < 16, "about 0.4 equal bytes are expected by chance"


@pytest.mark.parametrize(
    ("key", "sender", "context"),
    [
        (OTHER, MAKER.public, CONTEXT),
        (MAKER, RECEIVER.public, CONTEXT + b"2"),
        (RECEIVER, OTHER.public, CONTEXT),
        (RECEIVER, MAKER.public, b"another round"),
        (RECEIVER, MAKER.public, b""),
        (RECEIVER, bytes(32), CONTEXT),
    ],
    ids=["stranger", "own context", "other sender", "other context", "no context", "low order"],
)
def test_nobody_else_opens_it_and_nowhere_else(
    key: ChannelKey, sender: bytes, context: bytes
) -> None:
    """Another key, another claimed sender or another context: ProtocolError with the culprit."""
    with pytest.raises(ProtocolError) as caught:
        unseal(sealed(), key, ("maker", sender), context)
    assert caught.value.culprits == ("maker",)


@given(st.integers(0, box_bytes(64) * 8 - 1))
def test_every_flipped_bit_is_noticed(bit: int) -> None:
    """Nonce, ciphertext and tag are all authenticated."""
    box = bytearray(sealed())
    box[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(ProtocolError):
        unseal(bytes(box), RECEIVER, ("maker", MAKER.public), CONTEXT)


@given(st.binary(max_size=200))
def test_any_bytes_open_to_a_protocol_error(box: bytes) -> None:
    """Empty, short and long boxes raise nothing but ProtocolError."""
    with pytest.raises(ProtocolError):
        unseal(box, RECEIVER, ("maker", MAKER.public), CONTEXT)


@pytest.mark.parametrize("cut", [0, 1, 11, 12, 28, 91])
def test_truncated_and_extended_boxes_do_not_open(cut: int) -> None:
    """No prefix of a box, and no box with a byte more."""
    for box in (sealed()[:cut], sealed() + b"\0"):
        with pytest.raises(ProtocolError):
            unseal(box, RECEIVER, ("maker", MAKER.public), CONTEXT)


@pytest.mark.parametrize(
    "public",
    [
        bytes(32),
        b"\1" + bytes(31),
        bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
        bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
        bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
        bytes.fromhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
        b"",
        bytes(31),
    ],
)
def test_unusable_public_keys_are_refused_with_the_culprit(public: bytes) -> None:
    """Points of low order would make a secret that everyone knows (RFC 7748, section 6.1)."""
    with pytest.raises(ProtocolError, match="bob") as caught:
        seal(SEED, MAKER, ("bob", public), CONTEXT, bytes)
    assert caught.value.culprits == ("bob",)


def test_public_keys_are_those_of_rfc7748() -> None:
    """Alice's key pair of RFC 7748, section 6.1."""
    secret = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    public = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert ChannelKey(lambda n: secret[:n]).public.hex() == public


def test_a_channel_key_is_never_shown_nor_serialised() -> None:
    """Redacted repr, no pickle, no bytes."""
    assert repr(MAKER) == str(MAKER) == "ChannelKey(<secret>)"
    assert not hasattr(MAKER, "to_bytes")
    with pytest.raises(TypeError):
        pickle.dumps(MAKER)
