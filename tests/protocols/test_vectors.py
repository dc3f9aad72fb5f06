"""Known answers: regenerating them changes nothing, and everything broken is refused."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

import protocols
from protocols import ckks, errors, messages
from protocols.bfv import Parameters, SecretKey, Sum
from protocols.bitpacking import unpack
from protocols.encoding import FixedPoint
from protocols.identity import Roster, digest
from protocols.keystream import Keystream, Seed
from protocols.rounds import statement
from protocols.sealing import ChannelKey, unseal
from protocols.shamir import Share

FOLDER = Path(__file__).resolve().parents[1] / "vectors"
BAD = sorted(path.stem for path in FOLDER.glob("*_bad_*.json"))
ERRORS = {
    "MalformedMessageError": errors.MalformedMessageError,
    "ProtocolError": errors.ProtocolError,
    "ValueError": ValueError,
}


def vector(name: str) -> dict[str, Any]:
    """One stored vector."""
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return content


def data(hexadecimal: str) -> bytes:
    """The bytes of a stored field."""
    return bytes.fromhex(hexadecimal)


def test_regenerating_changes_no_byte(tmp_path: Path) -> None:
    """The script, run as documented, writes the committed files again; none is left over."""
    root = Path(next(iter(protocols.__path__))).parent
    subprocess.run(
        [sys.executable, FOLDER / "regenerate.py", tmp_path],
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    fresh = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    stored = {path.name: path.read_bytes() for path in FOLDER.glob("*.json")}
    assert sorted(fresh) == sorted(stored)
    for name, content in fresh.items():
        assert content == stored[name], f"{name} is not what the code makes now"


def parse(given: dict[str, Any]) -> object:
    """Parse a stored message of the class that `call` names."""
    kind, _, method = given["call"].partition(".")
    assert method == "from_bytes"
    return getattr(messages, kind).from_bytes(data(given["bytes"]))


def open_sum(given: dict[str, Any]) -> object:
    """Open with the key of the stored seed."""
    key = SecretKey(Seed(data(given["seed"])), Parameters(given["plain_bits"], given["additions"]))
    return key.open(data(given["bytes"]), given["slots"], given["contributions"])


def open_box(given: dict[str, Any]) -> object:
    """Unseal with the receiver's stored key."""
    receiver = ChannelKey(lambda size: data(given["receiver_secret"])[:size])
    maker = ("clinic-a", data(given["maker_public"]))
    return unseal(data(given["box"]), receiver, maker, data(given["context"]))


def verify(given: dict[str, Any]) -> object:
    """Verify a stored signature against its parts."""
    said = [data(part) for part in given["said"]]
    text = statement(data(given["context"]), given["phase"], given["sender"], *said)
    roster = Roster({given["sender"]: data(given["public"])})
    roster.verify(given["sender"], data(given["signature"]), text)
    return None


def decode(given: dict[str, Any]) -> object:
    """Decode a stored total."""
    known = vector("encoding")
    encoding = FixedPoint(
        *(known[name] for name in ("bits", "clip", "cohort", "slot_bits", "weight_cap")), True
    )
    total = np.array(given["total"], np.uint64)
    return encoding.decode(total, len(known["values"]), tuple(given["contributors"]))


CALLS: dict[str, Callable[[dict[str, Any]], object]] = {
    "Sum.add": lambda given: Sum(
        given["slots"], Parameters(given["plain_bits"], given["additions"])
    ).add(data(given["bytes"])),
    "Share.parse": lambda given: Share.parse(data(given["bytes"])),
    "SecretKey.open": open_sum,
    "unseal": open_box,
    "Roster.verify": verify,
    "unpack": lambda given: unpack(
        np.frombuffer(data(given["bytes"]), np.uint8), given["count"], given["bits"]
    ),
    "FixedPoint.decode": decode,
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_broken_is_refused_with_the_stated_error(name: str) -> None:
    """Each negative vector, by the call it names, and by exactly the error it names."""
    given = vector(name)
    call = CALLS.get(given["call"], parse)
    with pytest.raises(ERRORS[given["error"]]) as caught:
        call(given)
    assert caught.type is ERRORS[given["error"]]


def test_there_are_vectors() -> None:
    """An empty folder would pass everything above."""
    assert len(BAD) >= 60
    assert {vector(name)["error"] for name in BAD} == set(ERRORS)


# The positive vectors, read by other means than the code that made them


def test_stored_ciphertexts_open_to_the_stored_slots() -> None:
    """The key of the stored seed is the key of every later version."""
    given = vector("bfv_sum")
    wires = [data(wire) for wire in given["ciphertexts"]]
    total = Sum(len(given["slots"]), Parameters(given["plain_bits"], given["additions"]))
    for wire in wires:
        total.add(wire)
    assert total.to_bytes().hex() == given["sum"]
    count = len(given["slots"])
    opened = open_sum({**given, "bytes": given["sum"], "slots": count, "contributions": 3})
    assert np.array_equal(opened, np.array(given["slots"], np.uint64))  # type: ignore[arg-type]


def test_stored_ckks_ciphertexts_are_seeds_and_little_endian_residues() -> None:
    """The layout of a block, as integers of one width a prime; their residues add up to the sum."""
    given, blocks = vector("ckks_sum"), []
    seeds, sums = b"", [np.zeros(ckks.DEGREE, np.uint64) for _ in ckks.PRIMES]

    def stream(name: str) -> Keystream:
        return Keystream(Seed(data(given["seed"])), "test vectors", name.encode())

    def packed(values: NDArray[np.uint64], bits: int) -> bytes:
        digits = "".join(f"{value:0{bits}b}" for value in reversed(values.tolist()))
        return int(digits, 2).to_bytes(len(values) * bits // 8, "little")

    for i in range(given["additions"]):
        words, block = stream(f"ckks residues {i}"), stream(f"ckks seed {i}").bytes(64)
        seeds += block
        for row, (prime, bits) in enumerate(((1152921504606830593, 60), (1099510890497, 40))):
            residues = words.words(ckks.DEGREE) % np.uint64(prime)
            block += packed(residues, bits)
            sums[row] = (sums[row] + residues) % np.uint64(prime)
        blocks.append(digest("ckks ciphertext", block).hex())
    assert blocks == given["ciphertexts"]
    total = packed(sums[0], 60) + packed(sums[1], 40) + seeds
    assert digest("ckks sum", total).hex() == given["sum"]


def test_stored_digest_is_sha256_of_length_prefixed_fields() -> None:
    """Read with hashlib alone."""
    given = vector("digest")
    text = b"securefl/1\0" + given["domain"].encode() + b"\0"
    for field in map(data, given["fields"]):
        text += len(field).to_bytes(8, "big") + field
    assert hashlib.sha256(text).hexdigest() == given["digest"]


def test_stored_signature_verifies() -> None:
    """With the cryptography library alone, and by its parts."""
    given = vector("signature")
    public = Ed25519PublicKey.from_public_bytes(data(given["public"]))
    public.verify(data(given["signature"]), data(given["statement"]))
    verify(given)


def test_stored_box_opens() -> None:
    """The seed comes out; the public keys are those of the secrets."""
    given = vector("sealed_box")
    assert open_box(given) == Seed(data(given["seed"]))
    maker = X25519PrivateKey.from_private_bytes(data(given["maker_secret"]))
    assert maker.public_key().public_bytes_raw().hex() == given["maker_public"]
    receiver = X25519PublicKey.from_public_bytes(data(given["receiver_public"]))
    assert len(maker.exchange(receiver)) == 32


def test_stored_packings_are_little_endian_integers() -> None:
    """Read as one integer a width."""
    for bits, given in vector("bitpacking").items():
        number = int.from_bytes(data(given["packed"]), "little")
        mask = (1 << int(bits)) - 1
        found = [number >> (int(bits) * i) & mask for i in range(len(given["values"]))]
        assert found == [int(value) for value in given["values"]]


def test_stored_encoding_adds_up() -> None:
    """Integers within one of the exact values, slots by the module's formula, the mean by hand."""
    given = vector("encoding")
    width, k = given["field_bits"], given["fields"]
    levels = 2 ** (given["bits"] - 1) - 1
    for weight, integers, slots in zip(
        given["weights"], given["integers"], given["slots"], strict=True
    ):
        exact = np.clip(given["values"], -1, 1) * levels * weight / given["weight_cap"]
        assert np.abs(np.array(integers) - exact).max() < 1
        padded = integers + [0] * (-len(integers) % k)
        groups = [padded[i : i + k] for i in range(0, len(padded), k)]
        packed = [sum(v << (width * j) for j, v in enumerate(g)) % 2 ** (k * width) for g in groups]
        assert slots == [1, weight, *packed]
    weight = sum(given["weights"])
    sums = np.sum(given["integers"], axis=0)
    assert np.allclose(given["mean"], sums * given["weight_cap"] / (levels * weight), rtol=1e-15)


def sha(domain: str, *fields: bytes) -> bytes:
    """The project's digest, with hashlib alone."""
    text = b"".join(len(field).to_bytes(8, "big") + field for field in fields)
    return hashlib.sha256(b"securefl/1\0" + domain.encode() + b"\0" + text).digest()


def derived(secret: bytes, purpose: str, context: bytes) -> bytes:
    """The project's HKDF, with the cryptography library alone."""
    info = b"securefl/1\0" + purpose.encode() + b"\0" + context
    return HKDF(SHA256(), 32, None, info).derive(secret)


def words(secret: bytes, purpose: str, context: bytes, count: int) -> list[str]:
    """The first words of a keystream, with the cryptography library alone."""
    cipher = Cipher(algorithms.AES256(derived(secret, purpose, context)), modes.CTR(bytes(16)))
    stream = cipher.encryptor().update(bytes(8 * count))
    return [str(int.from_bytes(stream[i : i + 8], "little")) for i in range(0, 8 * count, 8)]


def test_stored_shares_lie_on_the_stored_polynomial() -> None:
    """By schoolbook arithmetic modulo 2^256 + 297."""
    given, prime = vector("shamir"), 2**256 + 297
    drawn = [int.from_bytes(data(draw), "big") % prime for draw in given["draws"]]
    coefficients = [int(given["secret"], 16), *drawn]
    assert len(coefficients) == given["threshold"]
    for x, share in given["shares"].items():
        value = sum(c * int(x) ** power for power, c in enumerate(coefficients)) % prime
        assert int(share, 16) == value
        assert len(share) == 66


def test_stored_noise_inverts_the_cumulative_masses_at_the_words_of_a_keystream() -> None:
    """By plain sums of exponentials: bit 0 is the sign, the rest the uniform of the magnitude.

    Above sigma 2048 a fine part of variance 6 k^2 and k times a coarse one, each from its words.
    """
    given = vector("noise")
    for name, draws in given["draws"].items():
        variance, k = Fraction(name) ** 2, 0
        parts = [(1, variance)]
        if float(name) > 2048:
            k = round((float(name) / 6**0.5) ** 0.5)
            parts = [(1, Fraction(6 * k * k)), (k, variance / k**2 - 6)]
        taken = words(
            data(given["seed"]), given["purpose"], data(given["context"]), 12 * len(parts)
        )
        expected = [0] * 12
        for at, (scale, v) in enumerate(parts):
            for i, word in enumerate(map(int, taken[12 * at : 12 * at + 12])):
                magnitude = inverse(Fraction(word >> 1, 1 << 63), v)
                expected[i] += scale * (-magnitude if word & 1 else magnitude)
        assert draws == expected


def inverse(uniform: Fraction, variance: Fraction) -> int:
    """The least m with uniform < P(|X| <= m), X the discrete Gaussian of that variance."""
    two_v = 2 * float(variance)
    reach = int(14 * float(variance) ** 0.5) + 2
    masses = [1.0, *(2 * math.exp(-j * j / two_v) for j in range(1, reach))]
    total, below = math.fsum(masses), 0.0
    for m, mass in enumerate(masses):
        below += mass
        if float(uniform) < below / total:
            return m
    raise AssertionError("a uniform beyond the last mass")


def test_stored_masks_are_keystreams_of_the_shared_secret() -> None:
    """X25519, HKDF and AES-256-CTR; the two sides differ in sign alone."""
    given = vector("masks")
    low, high = sorted(given["secrets"])
    secret = X25519PrivateKey.from_private_bytes(data(given["secrets"][low])).exchange(
        X25519PublicKey.from_public_bytes(data(given["publics"][high]))
    )
    context = data(given["context"])
    about = sha("pair mask", context, low.encode(), high.encode())
    pair = words(secret, "pair mask", about, 6)
    assert given["pair"][low] == {"sign": 1, "words": pair}
    assert given["pair"][high] == {"sign": -1, "words": pair}
    seed = data(given["seed"])
    own = words(seed, "self mask", sha("self mask", context, low.encode()), 6)
    assert given["self"] == {"sign": 1, "words": own}
    about = sha("commitment", data(vector("begin")["context"]), low.encode())
    assert given["commitment"] == derived(seed, "self mask commitment", about).hex()


def test_stored_mask_advertisement_is_signed_and_commits() -> None:
    """The public keys of the secrets, the commitment to the seed, the site's signature."""
    given = vector("mask_advertisement")
    offer = messages.MaskAdvertisement.from_bytes(data(given["advertisement"]))
    context = data(vector("begin")["context"])
    for secret, public in (("channel_secret", offer.channel), ("mask_secret", offer.mask)):
        key = X25519PrivateKey.from_private_bytes(data(given[secret]))
        assert key.public_key().public_bytes_raw() == public
    about = sha("commitment", context, offer.sender.encode())
    assert offer.commitment == derived(data(given["seed"]), "self mask commitment", about)
    said = (offer.channel, offer.mask, offer.commitment)
    text = sha("statement", context, b"advertise", offer.sender.encode(), *said)
    public_key = Ed25519PublicKey.from_public_bytes(data(given["public"]))
    public_key.verify(offer.signature, text)


def test_stored_opening_tag_is_keyed_by_the_he_seed() -> None:
    """HKDF of the seed, twice; over the contributors and the packed slots."""
    given = vector("opening_tag")
    context = data(given["context"])
    told = messages.OpeningTag.from_bytes(data(given["message"]))
    common = derived(data(given["seed"]), "opening", context)
    names = [site.encode() for site in given["contributors"]]
    assert told.tag == derived(common, "tag", sha("opened", *names, data(given["slots"])))
    assert data(given["salt"]) == derived(common, "salt", b"")
    text = sha("statement", context, b"open", told.sender.encode(), told.tag)
    Ed25519PublicKey.from_public_bytes(data(given["public"])).verify(told.signature, text)


def test_stored_released_shares_parse() -> None:
    """One kind of share a site."""
    given = vector("released_shares")
    said = messages.ReleasedShares.from_bytes(data(given["bytes"]))
    assert {item.owner: item.share.hex() for item in said.own} == given["own"]
    assert {item.owner: item.share.hex() for item in said.mask} == given["mask"]
