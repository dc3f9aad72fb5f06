"""Masks: uniform, independent wherever anything differs, and gone from the sum."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from protocols import masks
from protocols.keystream import Keystream, Seed
from protocols.masks import MaskKey

CONTEXT = b"session, round, model, members"
NAMES = ("a", "b", "c")


def key_of(name: str) -> MaskKey:
    """The same key for a name in every run."""
    return MaskKey.draw(Keystream(Seed(bytes(32)), "mask key", name.encode()).bytes)


KEYS = {name: key_of(name) for name in NAMES}
SEEDS = {name: Seed(bytes([ord(name)]) * 32) for name in NAMES}


def pair(me: str, peer: str, context: bytes = CONTEXT) -> masks.Term:
    """The mask of two of the sites, with my sign."""
    return KEYS[me].pair(me, peer, KEYS[peer].public, context)


def terms_of(me: str, names: tuple[str, ...], context: bytes = CONTEXT) -> list[masks.Term]:
    """Everything that `me` adds."""
    own = masks.own(SEEDS[me], me, context)
    return [own, *(pair(me, peer, context) for peer in names if peer != me)]


@pytest.mark.parametrize("bits", [2, 33, 40, 62, 63])
def test_every_bit_of_every_kind_of_mask_is_balanced(bits: int) -> None:
    """Pair masks and self masks: each of the p bits is one half of the time, within 5.5 sigma."""
    count = 100_000
    for terms in ([pair("a", "b")], [pair("b", "a")], [masks.own(SEEDS["a"], "a", CONTEXT)]):
        mask = masks.total(terms, count, bits)
        assert int(mask.max()) < 1 << bits
        for bit in range(bits):
            ones = int((mask >> np.uint64(bit) & np.uint64(1)).sum())
            assert abs(ones - count / 2) < 5.5 * (count / 4) ** 0.5, f"bit {bit}"


def test_masked_slots_are_balanced_whatever_the_vector() -> None:
    """A constant vector under masks shows nothing of itself; neighbouring bits do not correlate."""
    count, bits = 100_000, 40
    constant = np.full(count, 0x5A5A5A5A5A, np.uint64)
    [masked] = masks.add([constant], terms_of("a", NAMES), bits)
    columns = np.array([(masked >> np.uint64(b) & np.uint64(1)) for b in range(bits)], np.float64)
    correlation = np.corrcoef(columns) - np.eye(bits)
    assert abs(columns.mean(axis=1) - 0.5).max() < 5.5 * 0.5 / count**0.5
    assert abs(correlation).max() < 5.5 / count**0.5


def streams() -> dict[str, Keystream]:
    """Every mask of three sites in four contexts, once."""
    found = {}
    for context in (CONTEXT, b"another round", b"another model", b"other members"):
        for name in NAMES:
            found[f"self {name} {context!r}"] = masks.own(SEEDS[name], name, context)[1]
        for one, other in itertools.combinations(NAMES, 2):
            found[f"pair {one}{other} {context!r}"] = pair(one, other, context)[1]
    return found


def test_no_keystream_is_shared_between_rounds_peers_or_purposes() -> None:
    """All streams differ in every block, and no block of one is in another at any place."""
    blocks: dict[bytes, str] = {}
    for name, stream in streams().items():
        data = stream.bytes(16 * 500)
        for start in range(0, len(data), 16):
            block = data[start : start + 16]
            assert block not in blocks, f"{name} and {blocks[block]} share keystream"
            blocks[block] = name
    assert len(blocks) == 24 * 500


def test_one_secret_under_every_purpose_gives_unrelated_streams() -> None:
    """A seed used by mistake as self mask, commitment and pair mask would still not collide."""
    seed = SEEDS["a"]
    made = [
        masks.own(seed, "a", CONTEXT)[1].bytes(32),
        masks.own(seed, "b", CONTEXT)[1].bytes(32),
        masks.commitment(seed, "a", CONTEXT),
        masks.commitment(seed, "b", CONTEXT),
        masks.commitment(seed, "a", b"another"),
        Keystream(seed, "pair mask", CONTEXT).bytes(32),
        Keystream(seed, "self mask", CONTEXT).bytes(32),
        seed.derive("self mask commitment", CONTEXT),
    ]
    assert len(set(made)) == len(made)


def test_the_two_sides_of_a_pair_hold_the_same_mask_with_opposite_signs() -> None:
    """The lower name adds, the higher takes off."""
    for low, high in itertools.combinations(NAMES, 2):
        (plus, one), (minus, other) = pair(low, high), pair(high, low)
        assert (plus, minus) == (1, -1)
        assert one.bytes(64) == other.bytes(64)


@pytest.mark.parametrize("other", [b"another round", b"", CONTEXT + b"x"])
def test_masks_of_two_contexts_do_not_cancel(other: bytes) -> None:
    """Sites that were shown another model, round or cohort: what stays is uniform."""
    count, bits = 50_000, 40
    (_, one), (_, two) = pair("a", "b"), pair("b", "a", other)
    left = masks.total([(1, one), (-1, two)], count, bits)
    ones = np.array([(left >> np.uint64(b) & np.uint64(1)).mean() for b in range(bits)])
    assert abs(ones - 0.5).max() < 5.5 * 0.5 / count**0.5


@given(st.integers(2, 6), st.integers(1, 63), st.integers(0, 70), st.data())
@settings(max_examples=60)
def test_masks_cancel_in_the_sum(count: int, bits: int, slots: int, data: st.DataObject) -> None:
    """After the self masks are taken off, what is left is the sum modulo 2^p, for any p."""
    names = tuple(f"site-{i}" for i in range(count))
    keys = {name: key_of(name) for name in names}
    seeds = {name: Seed(name.encode().ljust(32, b"\0")) for name in names}
    slot = st.integers(0, 2**bits - 1)
    vectors = {
        name: np.array(data.draw(st.lists(slot, min_size=slots, max_size=slots)), np.uint64)
        for name in names
    }
    keep = np.uint64((1 << bits) - 1)
    total = np.zeros(slots, np.uint64)
    for me in names:
        terms = [masks.own(seeds[me], me, CONTEXT)]
        terms += [
            keys[me].pair(me, peer, keys[peer].public, CONTEXT) for peer in names if peer != me
        ]
        chunks = np.array_split(vectors[me], data.draw(st.integers(1, 3)))
        masked = np.concatenate(list(masks.add(chunks, terms, bits)))
        assert not len(masked) or int(masked.max()) < 1 << bits
        total += masked
    own = [masks.own(seeds[me], me, CONTEXT) for me in names]
    left = (total - masks.total(own, slots, bits)) & keep
    assert np.array_equal(left, sum(vectors.values(), np.zeros(slots, np.uint64)) & keep)


def test_a_dropped_sites_masks_come_off_with_its_secret() -> None:
    """From its key alone everyone's pair mask with it is rebuilt, with the sign turned."""
    slots, bits = 1000, 50
    vector = np.arange(slots, dtype=np.uint64)
    uploads = [
        np.concatenate(list(masks.add([vector], terms_of(me, NAMES), bits))) for me in ("a", "c")
    ]
    rebuilt = MaskKey(KEYS["b"].seed)
    outstanding = [masks.own(SEEDS[me], me, CONTEXT) for me in ("a", "c")]
    for peer in ("a", "c"):
        sign, stream = rebuilt.pair("b", peer, KEYS[peer].public, CONTEXT)
        outstanding.append((-sign, stream))
    total = uploads[0] + uploads[1] - masks.total(outstanding, slots, bits)
    assert np.array_equal(total & np.uint64((1 << bits) - 1), vector * np.uint64(2))


def test_chunks_are_masked_like_the_whole_vector() -> None:
    """Streams go on from chunk to chunk, and the caller's vector stays as it was."""
    vector = np.arange(100_000, dtype=np.uint64)
    before = vector.copy()

    def masked(*cuts: int) -> NDArray[np.uint64]:
        chunks = np.split(vector, list(cuts))
        return np.concatenate(list(masks.add(chunks, terms_of("b", NAMES), 33)))

    assert np.array_equal(masked(), masked(1, 1, 40_000, 99_999))
    assert np.array_equal(vector, before)
    whole = masks.total(terms_of("b", NAMES), len(vector), 33)
    assert np.array_equal((masked() - whole) & np.uint64(2**33 - 1), vector)


def test_a_mask_key_is_never_shown_nor_serialised() -> None:
    """Redacted repr, no pickle, no bytes."""
    key = KEYS["a"]
    assert repr(key) == str(key) == "MaskKey(<secret>)"
    assert not hasattr(key, "to_bytes")
    with pytest.raises(TypeError):
        pickle.dumps(key)


def test_mask_keys_are_those_of_rfc7748() -> None:
    """Alice's key pair of RFC 7748, section 6.1."""
    secret = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    public = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert MaskKey(Seed(secret)).public.hex() == public
