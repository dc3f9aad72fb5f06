"""Keystreams: HKDF-SHA256 and AES-256-CTR, reproducible, independent, and never shown."""

from __future__ import annotations

import copy
import hashlib
import hmac
import pickle

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from protocols.keystream import Keystream, Seed, hkdf

MATERIAL = bytes(range(32))


def rfc5869(secret: bytes, salt: bytes, info: bytes, size: int) -> bytes:
    """HKDF-SHA256 written from the RFC, with the standard library's HMAC alone."""
    key = hmac.digest(salt or bytes(32), secret, "sha256")
    out = block = b""
    for counter in range(1, 256):
        block = hmac.digest(key, block + info + bytes([counter]), "sha256")
        out += block
        if len(out) >= size:
            break
    return out[:size]


@pytest.mark.parametrize(
    ("secret", "salt", "info", "output"),
    [
        (
            "0b" * 22,
            "000102030405060708090a0b0c",
            "f0f1f2f3f4f5f6f7f8f9",
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            bytes(range(0x50)).hex(),
            bytes(range(0x60, 0xB0)).hex(),
            bytes(range(0xB0, 0x100)).hex(),
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c6"
            "5e590e09da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
        ),
        (
            "0b" * 22,
            "",
            "",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
    ids=["A.1", "A.2", "A.3"],
)
def test_the_oracle_is_rfc5869(secret: str, salt: str, info: str, output: str) -> None:
    """The RFC's own SHA-256 vectors, so that the next test compares with the RFC."""
    expected = bytes.fromhex(output)
    found = rfc5869(bytes.fromhex(secret), bytes.fromhex(salt), bytes.fromhex(info), len(expected))
    assert found == expected


@given(st.binary(min_size=1, max_size=80), st.binary(max_size=80), st.integers(1, 200))
def test_hkdf_is_rfc5869_with_purpose_and_context_as_info(
    secret: bytes, context: bytes, size: int
) -> None:
    """No salt; info is version, purpose and context, each ended before the next."""
    info = b"securefl/1\0" + b"masks" + b"\0" + context
    assert hkdf(secret, "masks", context, size) == rfc5869(secret, b"", info, size)


@given(st.lists(st.integers(0, 700_000), min_size=1, max_size=5))
def test_reading_in_pieces_gives_the_same_bytes(sizes: list[int]) -> None:
    """Reading n and then m is reading n + m, across internal buffers too."""
    pieces = Keystream(Seed(MATERIAL), "p", b"c")
    whole = Keystream(Seed(MATERIAL), "p", b"c").bytes(sum(sizes))
    assert b"".join(pieces.bytes(size) for size in sizes) == whole


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, (1 << 18) - 1, 1 << 18, (1 << 18) + 1])
@pytest.mark.parametrize("seed_bytes", [32, 64])
def test_bytes_are_aes256_ctr_under_the_derived_key(size: int, seed_bytes: int) -> None:
    """The cryptography library, asked directly, gives the same keystream."""
    material = hashlib.shake_256(b"seed").digest(seed_bytes)
    key = rfc5869(material, b"", b"securefl/1\0rounding\0round 3", 32)
    expected = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(size))
    assert Keystream(Seed(material), "rounding", b"round 3").bytes(size) == expected


def test_the_first_block_is_aes_of_counter_zero() -> None:
    """CTR starts at the zero counter block: checked through ECB."""
    key = Seed(MATERIAL).derive("p", b"c")
    block = Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update(bytes(16))  # noqa: S305
    assert Keystream(Seed(MATERIAL), "p", b"c").bytes(16) == block


def test_words_and_uniforms_read_the_same_stream() -> None:
    """words are little-endian 64-bit integers; uniforms their upper 53 bits in [0, 1)."""
    data = Keystream(Seed(MATERIAL), "p").bytes(8000)
    words = Keystream(Seed(MATERIAL), "p").words(1000)
    assert words.dtype == np.uint64
    assert words.tolist() == [int.from_bytes(data[i : i + 8], "little") for i in range(0, 8000, 8)]
    uniform = Keystream(Seed(MATERIAL), "p").uniform(1000)
    assert uniform.tolist() == [(int(word) >> 11) / 2**53 for word in words]


def test_uniforms_are_uniform() -> None:
    """In [0, 1), with mean and variance within five standard errors."""
    count = 1_000_000
    values = Keystream(Seed(MATERIAL), "p").uniform(count)
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 1 / 2) < 5 * np.sqrt(1 / 12 / count)
    assert abs(values.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / count)


@pytest.mark.parametrize(
    ("seed", "purpose", "context"),
    [
        (bytes(32), "p", b"c"),
        (MATERIAL, "q", b"c"),
        (MATERIAL, "p", b"d"),
        (MATERIAL, "p", b""),
        (MATERIAL, "pc", b""),
        (MATERIAL, "", b"pc"),
        (MATERIAL + bytes(32), "p", b"c"),
    ],
)
def test_another_seed_purpose_or_context_is_another_stream(
    seed: bytes, purpose: str, context: bytes
) -> None:
    """Half of the bits differ, within five standard deviations, wherever one part differs."""
    size = 20_000
    one = np.frombuffer(Keystream(Seed(MATERIAL), "p", b"c").bytes(size), np.uint8)
    other = np.frombuffer(Keystream(Seed(seed), purpose, context).bytes(size), np.uint8)
    differing = int(np.unpackbits(one ^ other).sum())
    assert abs(differing - 4 * size) < 5 * np.sqrt(2 * size)


@pytest.mark.parametrize("size", [0, 16, 31, 33, 63, 65])
def test_seeds_have_32_or_64_bytes(size: int) -> None:
    """A seed of any other length is refused, and the message shows the length alone."""
    with pytest.raises(ValueError, match=f"not {size}"):
        Seed(bytes(size))


def test_draw_takes_exactly_the_bytes_it_is_given() -> None:
    """Randomness is an argument: one call, of the size asked for."""
    asked: list[int] = []

    def randomness(size: int) -> bytes:
        asked.append(size)
        return bytes(range(size))

    assert Seed.draw(randomness) == Seed(bytes(range(32)))
    assert Seed.draw(randomness, 64) == Seed(bytes(range(64)))
    assert asked == [32, 64]


def test_seeds_compare_by_content_and_are_not_hashed() -> None:
    """Equal material is equal; a seed is no dictionary key, where its hash would leak."""
    assert Seed(MATERIAL) == Seed(bytearray(MATERIAL))
    assert Seed(MATERIAL) != Seed(bytes(32))
    assert Seed(MATERIAL) != MATERIAL
    with pytest.raises(TypeError):
        hash(Seed(MATERIAL))


@pytest.mark.parametrize(
    "secret", [Seed(MATERIAL), Keystream(Seed(MATERIAL), "p")], ids=["Seed", "Keystream"]
)
def test_secrets_are_never_shown_nor_serialised(secret: object) -> None:
    """Neither repr, str and format, nor pickle and copy, nor a to_bytes let a secret out."""
    for text in (repr(secret), str(secret), f"{secret}"):
        assert "<secret>" in text
        assert MATERIAL.hex()[:8] not in text
        assert repr(MATERIAL)[2:12] not in text
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError):
            pickle.dumps(secret, protocol)
    with pytest.raises(TypeError):
        copy.deepcopy(secret)
    assert not hasattr(secret, "to_bytes")
    assert not hasattr(secret, "__dict__")
