"""Seeds and shares sealed from one site to another: X25519, HKDF-SHA256, AES-256-GCM.

The server relays sealed boxes and can neither open them nor move them to another round, sender or
receiver: all of these are in the key derivation and in the associated data.
"""

from __future__ import annotations

from typing import NoReturn, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from protocols.errors import ProtocolError
from protocols.keystream import Randomness, Seed, hkdf
from protocols.shamir import SHARE_BYTES, Share

NONCE_BYTES = 12
TAG_BYTES = 16


def box_bytes(secret_bytes: int) -> int:
    """Length of a box that seals `secret_bytes`."""
    return NONCE_BYTES + secret_bytes + TAG_BYTES


@final
class ChannelKey:
    """One site's X25519 key for one round."""

    __slots__ = ("_private",)

    def __init__(self, randomness: Randomness) -> None:
        self._private = X25519PrivateKey.from_private_bytes(randomness(32))

    @property
    def public(self) -> bytes:
        """The public half, 32 bytes."""
        return self._private.public_key().public_bytes_raw()

    def _cipher(self, peer: tuple[str, bytes], context: bytes) -> AESGCM:
        name, public = peer
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:  # a point of low order, which gives an all-zero secret
            raise ProtocolError(f"{name} advertised an unusable X25519 key", [name]) from None
        return AESGCM(hkdf(shared, "sealed seed", context, 32))

    def __repr__(self) -> str:
        return "ChannelKey(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a channel key is not serialised")


# Under any private key a point of low order gives the all-zero secret: one key finds them all.
_PROBE = X25519PrivateKey.from_private_bytes(bytes(32))


def check_public(site: str, public: bytes) -> None:
    """Raise ProtocolError unless `public`, advertised by `site`, is a key that can be sealed for.

    RFC 7748, section 6.1. Needs no secret, so that a server can find the culprit by itself.
    """
    try:
        _PROBE.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise ProtocolError(f"{site} advertised an unusable X25519 key", [site]) from None


def seal(
    seed: Seed, key: ChannelKey, receiver: tuple[str, bytes], context: bytes, rand: Randomness
) -> bytes:
    """`seed` sealed for `receiver` (name, public key): nonce, ciphertext and tag.

    `context` must bind sender, receiver, both public keys, session and round.
    Raises ProtocolError when the receiver's public key is not a usable one.
    """
    return _seal(seed._material, key, receiver, context, rand)


def unseal(box: bytes, key: ChannelKey, sender: tuple[str, bytes], context: bytes) -> Seed:
    """The seed in `box` from `sender` (name, public key); ProtocolError unless it is intact."""
    try:
        return Seed(_unseal(box, key, sender, context))
    except ValueError:
        raise ProtocolError(f"what {sender[0]} sealed is not a seed", [sender[0]]) from None


def seal_shares(
    shares: tuple[Share, Share],
    key: ChannelKey,
    receiver: tuple[str, bytes],
    context: bytes,
    rand: Randomness,
) -> bytes:
    """One site's shares of a self-mask seed and of a mask secret, sealed as `seal` does."""
    plain = b"".join(share.reveal() for share in shares)
    return _seal(plain, key, receiver, context, rand)


def unseal_shares(
    box: bytes, key: ChannelKey, sender: tuple[str, bytes], context: bytes
) -> tuple[Share, Share]:
    """The two shares in `box` from `sender`; ProtocolError unless they are intact."""
    try:
        plain = _unseal(box, key, sender, context)
        return Share.parse(plain[:SHARE_BYTES]), Share.parse(plain[SHARE_BYTES:])
    except ValueError:
        raise ProtocolError(f"what {sender[0]} sealed are no shares", [sender[0]]) from None


def seal_data(
    data: bytes, key: ChannelKey, receiver: tuple[str, bytes], context: bytes, rand: Randomness
) -> bytes:
    """Any secret bytes, sealed as `seal` does."""
    return _seal(data, key, receiver, context, rand)


def unseal_data(box: bytes, key: ChannelKey, sender: tuple[str, bytes], context: bytes) -> bytes:
    """The bytes in `box` from `sender` (name, public key); ProtocolError unless it is intact."""
    return _unseal(box, key, sender, context)


def _seal(
    plain: bytes, key: ChannelKey, receiver: tuple[str, bytes], context: bytes, rand: Randomness
) -> bytes:
    nonce = rand(NONCE_BYTES)
    return nonce + key._cipher(receiver, context).encrypt(nonce, plain, context)


def _unseal(box: bytes, key: ChannelKey, sender: tuple[str, bytes], context: bytes) -> bytes:
    cipher = key._cipher(sender, context)
    try:
        return cipher.decrypt(box[:NONCE_BYTES], box[NONCE_BYTES:], context)
    except (ValueError, InvalidTag):
        raise ProtocolError(f"the box sealed by {sender[0]} does not open", [sender[0]]) from None
