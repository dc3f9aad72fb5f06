"""Shamir: any t shares recover the secret, fewer tell nothing, and nothing is shown."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.keystream import Keystream, Seed
from protocols.shamir import PRIME, SHARE_BYTES, Share, combine, split

MATERIAL = bytes(range(32))
SECRETS = st.sampled_from([bytes(32), b"\xff" * 32, MATERIAL]) | st.binary(min_size=32, max_size=32)


def randomness(name: str = "coefficients") -> Keystream:
    """The same draws in every run."""
    return Keystream(Seed(MATERIAL), "tests", name.encode())


def is_prime(number: int) -> bool:
    """Miller and Rabin's test to twelve bases."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        power = pow(base, odd, number)
        if power not in (1, number - 1) and not any(
            (power := power * power % number) == number - 1 for _ in range(twos - 1)
        ):
            return False
    return True


def test_the_field_is_a_field_that_holds_every_secret() -> None:
    """2^256 + 297 is prime; the test knows a composite number when it sees one."""
    assert PRIME > 2**256
    assert is_prime(PRIME)
    assert not is_prime(PRIME + 2)
    assert not is_prime(561)


@given(SECRETS, st.integers(1, 12), st.data())
@settings(max_examples=60)
def test_any_threshold_of_shares_recovers_the_secret(
    secret: bytes, points: int, data: st.DataObject
) -> None:
    """Whichever t of n; more of them do too."""
    threshold = data.draw(st.integers(1, points))
    places = data.draw(st.sets(st.integers(1, 1000), min_size=points, max_size=points))
    shares = split(Seed(secret), threshold, places, randomness().bytes)
    assert shares.keys() == places
    chosen = data.draw(st.sets(st.sampled_from(sorted(places)), min_size=threshold))
    assert combine({x: shares[x] for x in chosen}) == Seed(secret)


@pytest.mark.parametrize("threshold", [2, 3, 4])
def test_every_set_of_shares_below_the_threshold_misses_the_secret(threshold: int) -> None:
    """t - 1 shares interpolate to something else, whichever they are."""
    shares = split(Seed(MATERIAL), threshold, range(1, 6), randomness().bytes)
    for points in itertools.combinations(range(1, 6), threshold - 1):
        try:
            found = combine({x: shares[x] for x in points})
        except ValueError:
            continue
        assert found != Seed(MATERIAL)


@given(SECRETS, SECRETS, st.integers(2, 6))
@settings(max_examples=30)
def test_fewer_shares_fit_every_secret(one: bytes, other: bytes, threshold: int) -> None:
    """Perfect secrecy: t - 1 shares of one secret are also shares of any other one.

    The polynomial through them and the other secret has degree t - 1: it explains them as well.
    """
    shares = split(Seed(one), threshold, range(1, threshold + 1), randomness().bytes)
    fewer = {x: share for x, share in shares.items() if x < threshold}
    known = {x: int.from_bytes(share.reveal(), "big") for x, share in fewer.items()}
    known[0] = int.from_bytes(other, "big")
    at = threshold
    value = 0
    for x, y in known.items():
        numerator = denominator = 1
        for z in known:
            if z != x:
                numerator, denominator = numerator * (at - z), denominator * (x - z)
        value += y * numerator * pow(denominator, -1, PRIME)
    last = Share(value % PRIME)
    assert combine({**fewer, at: last}) == Seed(other)


def test_every_bit_of_a_share_is_balanced() -> None:
    """With t = 2, one share of a fixed secret is uniform over many draws."""
    draws, count = randomness("balance"), 2000
    ones = [0] * 256
    for _ in range(count):
        value = int.from_bytes(split(Seed(bytes(32)), 2, (1, 2), draws.bytes)[1].reveal(), "big")
        for bit in range(256):
            ones[bit] += value >> bit & 1
    assert max(abs(seen - count / 2) for seen in ones) < 5.5 * (count / 4) ** 0.5


def test_fresh_coefficients_are_drawn_for_every_split() -> None:
    """t - 1 coefficients of 48 bytes each: shares of one secret twice are unrelated."""
    asked: list[int] = []

    def counted(size: int) -> bytes:
        asked.append(size)
        return bytes([len(asked)]) * size

    first = split(Seed(MATERIAL), 3, range(1, 5), counted)
    second = split(Seed(MATERIAL), 3, range(1, 5), counted)
    assert asked == [48] * 4
    assert all(first[x].reveal() != second[x].reveal() for x in range(1, 5))


@pytest.mark.parametrize(("threshold", "points"), [(0, 3), (-1, 3), (4, 3), (1, 0)])
def test_thresholds_outside_the_points_are_refused(threshold: int, points: int) -> None:
    """The caller's mistake: ValueError with both numbers."""
    with pytest.raises(ValueError, match=f"threshold = {threshold}"):
        split(Seed(MATERIAL), threshold, range(1, points + 1), randomness().bytes)


def test_the_secrets_own_point_is_refused() -> None:
    """The share at 0 would be the secret."""
    with pytest.raises(ValueError, match="point 0"):
        split(Seed(MATERIAL), 2, range(3), randomness().bytes)


def test_a_secret_of_another_size_is_not_shared() -> None:
    """64 bytes do not fit into the field."""
    with pytest.raises(ValueError, match="32-byte"):
        split(Seed(MATERIAL + bytes(32)), 2, range(1, 4), randomness().bytes)


def test_wrong_shares_give_another_secret_or_an_error() -> None:
    """Never the right secret by chance; the caller's commitment tells."""
    shares = split(Seed(MATERIAL), 3, range(1, 6), randomness().bytes)
    assert combine({1: shares[2], 2: shares[1], 3: shares[3]}) != Seed(MATERIAL)
    # f(x) = 2^256 + 10 is no 32-byte secret, though every share is a field element.
    with pytest.raises(ValueError, match="not shares"):
        combine({1: Share(2**256 + 10)})


@given(st.binary(max_size=40))
def test_bytes_are_a_share_or_a_value_error(data: bytes) -> None:
    """33 bytes below the prime; reveal is the inverse."""
    if len(data) == SHARE_BYTES and int.from_bytes(data, "big") < PRIME:
        assert Share.parse(data).reveal() == data
    else:
        with pytest.raises(ValueError, match="share"):
            Share.parse(data)


@pytest.mark.parametrize("value", [-1, PRIME, PRIME + 1, 2**300])
def test_a_share_is_a_field_element(value: int) -> None:
    """Nothing outside 0 to p - 1."""
    with pytest.raises(ValueError, match="field"):
        Share(value)
    assert Share(PRIME - 1).reveal() == (PRIME - 1).to_bytes(33, "big")


def test_shares_are_never_shown_nor_serialised() -> None:
    """Redacted repr; no pickle, no copy, no to_bytes: `reveal` is the one door."""
    share = Share(int.from_bytes(MATERIAL, "big"))
    for text in (repr(share), str(share), f"{[share]}"):
        assert "<secret>" in text
        assert MATERIAL[-4:].hex() not in text
        assert str(int.from_bytes(MATERIAL, "big"))[:8] not in text
    with pytest.raises(TypeError):
        pickle.dumps(share)
    with pytest.raises(TypeError):
        copy.deepcopy(share)
    assert not hasattr(share, "to_bytes")
    assert not hasattr(share, "__dict__")
