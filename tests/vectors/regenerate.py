"""Rewrite the known answers: `python tests/vectors/regenerate.py [FOLDER]`.

Everything here is deterministic, so that regenerating leaves git clean. The one exception, a BFV
ciphertext, is randomised by SEAL: the stored ones are kept, and checked again.

Files named *_bad_* hold what must be refused: `call` says by what, `error` with what.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from protocols import bfv_sum, ckks, masked_bfv, masks, plain, secagg, shamir
from protocols.bfv import MODULUS, SEED_BYTES, Parameters, SecretKey, Sum
from protocols.bitpacking import pack, unpack
from protocols.encoding import FixedPoint
from protocols.identity import Identity, Roster, SigningKey, digest
from protocols.keystream import Keystream, Seed
from protocols.masks import MaskKey
from protocols.messages import (
    Advertisement,
    Advertisements,
    Begin,
    Confirmation,
    Confirmations,
    MaskAdvertisement,
    MaskAdvertisements,
    OpeningTag,
    RelayedSecrets,
    ReleasedShare,
    ReleasedShares,
    SealedSeeds,
    SealedShares,
    SharedSecrets,
    SumToOpen,
    Survivors,
    Upload,
)
from protocols.noise import DiscreteGaussian
from protocols.rounds import Expected, statement
from protocols.sealing import ChannelKey, seal

HERE = Path(__file__).resolve().parent
MATERIAL = bytes(range(64))
SITES = ("clinic-a", "clinic-b", "clinic-c")
BEGIN = Begin(bytes(range(16)), 5, SITES, 2, 2, bytes(range(32, 64)))
ENCODING = FixedPoint(8, 1.0, 3, 30, weight_cap=4, weight_slot=True)
VALUES = (0.0, 1.0, -1.0, 0.5, -0.5, 0.001, -0.001, 3.0, -3.0, 0.3333333333333333, 0.75)
BFV_SLOTS, BFV_BITS = 20, 44
BFV = Parameters(BFV_BITS, len(SITES))
CKKS = ckks.Parameters(20, len(SITES), 8)
WIDTHS = (1, 5, 8, 20, 33, 54, 64)

Vectors = dict[str, dict[str, Any]]


def stream(name: str) -> Keystream:
    """Fixed bytes for each purpose of this file."""
    return Keystream(Seed(MATERIAL), "test vectors", name.encode())


def identities() -> dict[str, Identity]:
    """The sites' fixed keys."""
    keys = {site: SigningKey(stream(f"signing key of {site}").bytes) for site in SITES}
    roster = Roster({site: key.public for site, key in keys.items()})
    return {site: Identity(site, key, roster) for site, key in keys.items()}


def known_answers() -> Vectors:
    """What each deep module answers to fixed inputs."""
    seed = Seed(MATERIAL)
    widths = {bits: [(i * 0x9E3779B97F4A7C15) % (1 << bits) for i in range(11)] for bits in WIDTHS}
    return {
        "keystream": {
            "seed": MATERIAL.hex(),
            "purpose": "masks",
            "context": b"round 5".hex(),
            "derived": seed.derive("masks", b"round 5").hex(),
            "bytes": Keystream(seed, "masks", b"round 5").bytes(48).hex(),
            "words": [str(word) for word in Keystream(seed, "masks", b"round 5").words(6)],
            "uniform": Keystream(seed, "masks", b"round 5").uniform(6).tolist(),
        },
        "noise": {
            "seed": MATERIAL.hex(),
            "purpose": "noise",
            "context": b"round 5".hex(),
            "draws": {
                str(sigma): DiscreteGaussian(sigma)
                .sample(Keystream(seed, "noise", b"round 5"), 12)
                .tolist()
                for sigma in (0.5, 2.25, 50.0, 2048.0, 65536.0)
            },
        },
        "bitpacking": {
            str(bits): {
                "values": [str(value) for value in values],
                "packed": pack(np.array(values, np.uint64), bits).tobytes().hex(),
            }
            for bits, values in widths.items()
        },
        "encoding": encoding(),
        "digest": {
            "domain": "example",
            "fields": [b"".hex(), b"a".hex(), b"bc".hex()],
            "digest": digest("example", b"", b"a", b"bc").hex(),
        },
        "begin": {
            "session": BEGIN.session.hex(),
            "round": BEGIN.round,
            "cohort": SITES,
            "minimum": BEGIN.minimum,
            "threshold": BEGIN.threshold,
            "binding": BEGIN.binding.hex(),
            "bytes": BEGIN.to_bytes().hex(),
            "context": BEGIN.context.hex(),
        },
        "signature": signature_parts(),
        "sealed_box": sealed_box(),
        "plain_upload": plain_upload(),
        "bfv_sealed_seeds": sealed_seeds(),
        "bfv_sum": bfv(),
        "ckks_sum": ckks_opening(),
        "shamir": shamir_shares(),
        "masks": mask_streams(),
        "mask_advertisement": mask_advertisement(),
        "released_shares": released(),
        "opening_tag": opening_tag(),
    }


def signature_parts() -> dict[str, Any]:
    """What clinic-a signs about an upload, part by part."""
    key = SigningKey(stream("signing key of clinic-a").bytes)
    said = statement(BEGIN.context, "upload", "clinic-a", bytes(32), b"payload")
    return {
        "secret": stream("signing key of clinic-a").bytes(32).hex(),
        "public": key.public.hex(),
        "context": BEGIN.context.hex(),
        "phase": "upload",
        "sender": "clinic-a",
        "said": [bytes(32).hex(), b"payload".hex()],
        "statement": said.hex(),
        "signature": key.sign(said).hex(),
    }


def encoding() -> dict[str, Any]:
    """Fixed-point slots of one vector, and the mean of it with itself rounded otherwise."""
    vectors = [
        np.concatenate(
            list(ENCODING.encode(np.array(VALUES), weight, stream(f"rounding {weight}")))
        )
        for weight in (4, 3)
    ]
    total = (vectors[0] + vectors[1]) & np.uint64((1 << ENCODING.plain_bits) - 1)
    header = ENCODING.header_slots
    return {
        "bits": ENCODING.bits,
        "clip": ENCODING.clip,
        "cohort": ENCODING.cohort,
        "slot_bits": ENCODING.slot_bits,
        "weight_cap": ENCODING.weight_cap,
        "field_bits": ENCODING.field_bits,
        "fields": ENCODING.fields,
        "values": VALUES,
        "weights": [4, 3],
        "integers": [ENCODING.unpack(v[header:], len(VALUES)).tolist() for v in vectors],
        "slots": [vector.tolist() for vector in vectors],
        "total": total.tolist(),
        "mean": ENCODING.decode(total, len(VALUES), SITES[:2]).mean.tolist(),
    }


def sealed_box() -> dict[str, Any]:
    """A seed sealed with fixed keys and a fixed nonce."""
    maker = ChannelKey(stream("channel key of the maker").bytes)
    receiver = ChannelKey(stream("channel key of the receiver").bytes)
    box = seal(
        Seed(MATERIAL), maker, ("clinic-b", receiver.public), b"context", stream("nonce").bytes
    )
    return {
        "seed": MATERIAL.hex(),
        "maker_secret": stream("channel key of the maker").bytes(32).hex(),
        "maker_public": maker.public.hex(),
        "receiver_secret": stream("channel key of the receiver").bytes(32).hex(),
        "receiver_public": receiver.public.hex(),
        "context": b"context".hex(),
        "box": box.hex(),
    }


def expected(site: str, slot_bits: int) -> Expected:
    """What a site insists on in the round of these vectors."""
    fixed = FixedPoint(8, 1.0, 3, slot_bits)
    me = identities()[site]
    return Expected(me, BEGIN.session, BEGIN.round, BEGIN.binding, 2, fixed, len(VALUES))


def plain_upload() -> dict[str, Any]:
    """The whole upload of one site under plain."""
    mine = expected("clinic-a", plain.slot_bits(3))
    slots = mine.encoding.encode(np.array(VALUES), 1, stream("rounding"))
    _, reply = plain.client_step1(mine, BEGIN.to_bytes(), slots, stream("none").bytes)
    return {"begin": BEGIN.to_bytes().hex(), "values": VALUES, "upload": reply.hex()}


def advertisements() -> tuple[Any, Advertisements]:
    """The maker's state and what it is shown in phase share."""
    states, items = {}, []
    for site in SITES:
        mine = expected(site, bfv_sum.slot_bits(3))
        states[site], reply = bfv_sum.client_step1(
            mine, BEGIN.to_bytes(), stream(f"channel of {site}").bytes
        )
        items.append(Advertisement.from_bytes(reply))
    return states[SITES[0]], Advertisements(tuple(items))


def sealed_seeds() -> dict[str, Any]:
    """Both key phases of bfv, with fixed randomness."""
    state, shown = advertisements()
    _, reply = bfv_sum.client_step2(state, shown.to_bytes(), stream("maker").bytes)
    return {"advertisements": shown.to_bytes().hex(), "sealed_seeds": reply.hex()}


def shamir_shares() -> dict[str, Any]:
    """A secret in five shares, any three of which recover it."""
    draws = stream("coefficients").bytes
    shares = shamir.split(Seed(MATERIAL[:32]), 3, range(1, 6), draws)
    return {
        "secret": MATERIAL[:32].hex(),
        "threshold": 3,
        "draws": [
            draw.hex() for draw in (stream("coefficients").bytes(96)[i : i + 48] for i in (0, 48))
        ],
        "shares": {str(x): share.reveal().hex() for x, share in shares.items()},
    }


def mask_streams() -> dict[str, Any]:
    """A pair's mask from either side, a self mask and its commitment: the first words of each."""
    one, other = (MaskKey.draw(stream(f"mask key of {site}").bytes) for site in SITES[:2])
    seed = Seed(stream("self mask").bytes(32))
    pairs = {
        SITES[0]: one.pair(SITES[0], SITES[1], other.public, b"context"),
        SITES[1]: other.pair(SITES[1], SITES[0], one.public, b"context"),
    }
    sign, own = masks.own(seed, SITES[0], b"context")
    return {
        "context": b"context".hex(),
        "secrets": {site: stream(f"mask key of {site}").bytes(32).hex() for site in SITES[:2]},
        "publics": {SITES[0]: one.public.hex(), SITES[1]: other.public.hex()},
        "pair": {
            site: {"sign": sign, "words": [str(word) for word in mask.words(6)]}
            for site, (sign, mask) in pairs.items()
        },
        "seed": stream("self mask").bytes(32).hex(),
        "self": {"sign": sign, "words": [str(word) for word in own.words(6)]},
        "commitment": masks.commitment(seed, SITES[0], BEGIN.context).hex(),
    }


def mask_advertisement() -> dict[str, Any]:
    """What one site advertises under secagg and masked-bfv, with fixed randomness."""
    mine = expected(SITES[0], secagg.slot_bits(3))
    randomness = stream("secrets of clinic-a").bytes
    _, reply = secagg.client_step1(mine, BEGIN.to_bytes(), randomness)
    channel, mask, seed = (stream("secrets of clinic-a").bytes(96)[i : i + 32] for i in (0, 32, 64))
    return {
        "begin": BEGIN.to_bytes().hex(),
        "public": mine.identity.key.public.hex(),
        "channel_secret": channel.hex(),
        "mask_secret": mask.hex(),
        "seed": seed.hex(),
        "advertisement": reply.hex(),
    }


def released() -> dict[str, Any]:
    """Shares released in phase unmask when the third site is out of the sum."""
    share = stream("share").bytes(32)
    own = tuple(ReleasedShare(site, b"\0" + share) for site in SITES[:2])
    lost = (ReleasedShare(SITES[2], b"\1" + bytes(32)),)
    return {
        "own": {item.owner: item.share.hex() for item in own},
        "mask": {item.owner: item.share.hex() for item in lost},
        "bytes": ReleasedShares(SITES[0], own, lost, bytes(64)).to_bytes().hex(),
    }


@cache
def bfv() -> dict[str, Any]:
    """Stored ciphertexts under the key of a fixed seed, their sum, and what it opens to."""
    key = SecretKey(Seed(MATERIAL), BFV)
    slots = [
        stream(f"slots {i}").words(BFV_SLOTS) >> np.uint64(64 - BFV_BITS) for i in range(len(SITES))
    ]
    stored = HERE / "bfv_sum.json"
    if stored.exists():
        wires = [bytes.fromhex(wire) for wire in json.loads(stored.read_text())["ciphertexts"]]
    else:
        wires = [bytes(key.encrypt([vector])) for vector in slots]
    total = Sum(BFV_SLOTS, BFV)
    for wire in wires:
        total.add(wire)
    opened = key.open(total.to_bytes(), BFV_SLOTS, len(wires))
    truth = sum(slots, np.zeros(BFV_SLOTS, np.uint64)) & np.uint64((1 << BFV_BITS) - 1)
    if not np.array_equal(opened, truth):
        raise SystemExit("bfv_sum.json: the stored ciphertexts no longer open to their slots")
    return {
        "seed": MATERIAL.hex(),
        "plain_bits": BFV.plain_bits,
        "additions": BFV.additions,
        "ciphertexts": [wire.hex() for wire in wires],
        "sum": total.to_bytes().hex(),
        "slots": opened.tolist(),
    }


def ckks_opening() -> dict[str, Any]:
    """Uniform ciphertexts of 100 KB, told by how they are drawn, and what their sum opens to.

    Uniform ones open to uniform slots: what any key, seed, residue or byte order that were another
    would change.
    """
    wires = []
    for i in range(len(SITES)):
        words, wire = stream(f"ckks residues {i}"), stream(f"ckks seed {i}").bytes(SEED_BYTES)
        for prime, bits in zip(ckks.PRIMES, ckks.PRIME_BITS, strict=True):
            wire += pack(words.words(ckks.DEGREE) % np.uint64(prime), bits).tobytes()
        wires.append(wire)
    total = ckks.Sum(CKKS)
    for wire in wires:
        total.add(wire)
    key = ckks.SecretKey(Seed(MATERIAL), CKKS)
    return {
        "seed": MATERIAL.hex(),
        "plain_bits": CKKS.plain_bits,
        "additions": CKKS.additions,
        "ciphertexts": [digest("ckks ciphertext", wire).hex() for wire in wires],
        "sum": digest("ckks sum", total.to_bytes()).hex(),
        "slots": key.open(total.to_bytes(), CKKS.slots, len(wires)).tolist(),
    }


def opening_tag() -> dict[str, Any]:
    """A site's answer to the opening under reveal = "sites", and the salt of that round."""
    context = bytes(range(32))
    common = masked_bfv.opening_secret(Seed(MATERIAL), context)
    slots = bytes(range(100))
    tag = masked_bfv.opening_tag(common, SITES, slots)
    key = SigningKey(lambda size: bytes(range(size)))
    signature = key.sign(statement(context, "open", SITES[0], tag))
    return {
        "seed": MATERIAL.hex(),
        "context": context.hex(),
        "contributors": list(SITES),
        "slots": slots.hex(),
        "salt": common.derive("salt").hex(),
        "public": key.public.hex(),
        "message": OpeningTag(SITES[0], tag, signature).to_bytes().hex(),
    }


def bad(what: str, call: str, error: str, **given: Any) -> dict[str, Any]:
    """One negative vector."""
    return {"what": what, "call": call, "error": error, **given}


def bad_message(what: str, kind: str, data: bytes) -> dict[str, Any]:
    """Bytes that must not parse as a message of class `kind`."""
    return bad(what, f"{kind}.from_bytes", "MalformedMessageError", bytes=data.hex())


def changed(message: Any, **fields: Any) -> bytes:
    """The bytes of `message` with fields that its class would refuse."""
    values = {name: getattr(message, name) for name in message.__struct_fields__} | fields
    return msgspec.msgpack.encode([type(message).__name__, *values.values()])


def bad_messages() -> Vectors:
    """Messages with one broken part each."""
    upload = Upload.from_bytes(bytes.fromhex(plain_upload()["upload"]))
    wire = upload.to_bytes()
    shown = advertisements()[1]
    seeds = SealedSeeds.from_bytes(bytes.fromhex(sealed_seeds()["sealed_seeds"]))
    first, second, third = seeds.items
    other_key = msgspec.structs.replace(second, key=bytes(32))
    confirmations = tuple(Confirmation(site, bytes(64)) for site in SITES)
    to_open = SumToOpen(SITES, confirmations, b"sum")
    offer = MaskAdvertisement.from_bytes(bytes.fromhex(mask_advertisement()["advertisement"]))
    offers = MaskAdvertisements((offer, msgspec.structs.replace(offer, sender=SITES[1])))
    boxes = tuple(
        SealedShares(SITES[0], site, bytes(94), bytes(32), bytes(32)) for site in SITES[1:]
    )
    shared = SharedSecrets(boxes, bytes(32), (), bytes(64))
    relayed = RelayedSecrets(
        SITES,
        tuple(SealedShares(s, SITES[0], bytes(94), bytes(32), bytes(32)) for s in SITES[1:]),
        (),
    )
    shares = ReleasedShares.from_bytes(bytes.fromhex(released()["bytes"]))
    survivors = Survivors(SITES)
    told = OpeningTag.from_bytes(bytes.fromhex(opening_tag()["message"]))
    return {
        "begin_bad_unsorted_cohort": bad_message(
            "the cohort is not in order", "Begin", changed(BEGIN, cohort=SITES[::-1])
        ),
        "begin_bad_repeated_site": bad_message(
            "a site is twice in the cohort", "Begin", changed(BEGIN, cohort=(SITES[0], *SITES))
        ),
        "begin_bad_minimum_of_one": bad_message(
            "a sum of one would be an update", "Begin", changed(BEGIN, minimum=1)
        ),
        "begin_bad_minimum_above_cohort": bad_message(
            "nobody could ever answer", "Begin", changed(BEGIN, minimum=4)
        ),
        "begin_bad_threshold_of_zero": bad_message(
            "nobody would have to agree", "Begin", changed(BEGIN, threshold=0)
        ),
        "begin_bad_threshold_above_cohort": bad_message(
            "no mask could ever be taken off", "Begin", changed(BEGIN, threshold=4)
        ),
        "begin_bad_round_zero": bad_message(
            "rounds count from one", "Begin", changed(BEGIN, round=0)
        ),
        "begin_bad_site_name": bad_message(
            "a path is no site name", "Begin", changed(BEGIN, cohort=("../etc", "clinic-a"))
        ),
        "begin_bad_second_encoding": bad_message(
            "5 as a 16-bit integer: not the one encoding",
            "Begin",
            BEGIN.to_bytes().replace(b"\x05\x93", b"\xcd\x00\x05\x93"),
        ),
        "upload_bad_truncated": bad_message("a byte is missing", "Upload", wire[:-1]),
        "upload_bad_trailing_byte": bad_message("a byte too many", "Upload", wire + b"\0"),
        "upload_bad_tag": bad_message("another class", "Upload", BEGIN.to_bytes()),
        "upload_bad_short_signature": bad_message(
            "63 bytes of signature", "Upload", changed(upload, signature=bytes(63))
        ),
        "upload_bad_huge_length": bad_message(
            "a payload of 2^32 - 1 bytes", "Upload", wire[:50] + bytes.fromhex("c6ffffffff")
        ),
        "advertisements_bad_repeated_site": bad_message(
            "two keys of one site",
            "Advertisements",
            changed(shown, items=(shown.items[0], *shown.items)),
        ),
        "sealed_seeds_bad_two_seeds": bad_message(
            "sites would hold different keys",
            "SealedSeeds",
            changed(seeds, items=(first, other_key, third)),
        ),
        "sum_to_open_bad_repeated_contributor": bad_message(
            "an update counted twice",
            "SumToOpen",
            changed(to_open, contributors=(SITES[0], *SITES)),
        ),
        "sum_to_open_bad_single_contributor": bad_message(
            "an update, not a sum", "SumToOpen", changed(to_open, contributors=SITES[:1])
        ),
        "sum_to_open_bad_repeated_confirmation": bad_message(
            "one site confirms for two",
            "SumToOpen",
            changed(to_open, confirmations=(confirmations[0], *confirmations)),
        ),
        "mask_advertisements_bad_repeated_site": bad_message(
            "two pairs of keys of one site",
            "MaskAdvertisements",
            changed(offers, items=(offer, *offers.items)),
        ),
        "mask_advertisements_bad_unsorted": bad_message(
            "not in order", "MaskAdvertisements", changed(offers, items=offers.items[::-1])
        ),
        "mask_advertisement_bad_short_commitment": bad_message(
            "31 bytes of commitment",
            "MaskAdvertisement",
            changed(offer, commitment=offer.commitment[:-1]),
        ),
        "shared_secrets_bad_two_senders": bad_message(
            "boxes in two names",
            "SharedSecrets",
            changed(
                shared,
                shares=(
                    boxes[0],
                    SealedShares(SITES[1], SITES[2], bytes(94), bytes(32), bytes(32)),
                ),
            ),
        ),
        "shared_secrets_bad_repeated_receiver": bad_message(
            "two boxes for one site", "SharedSecrets", changed(shared, shares=(boxes[0], *boxes))
        ),
        "shared_secrets_bad_two_seeds": bad_message(
            "sites would hold different keys",
            "SharedSecrets",
            changed(shared, seeds=(first, other_key, third)),
        ),
        "relayed_secrets_bad_repeated_sender": bad_message(
            "two boxes of one site",
            "RelayedSecrets",
            changed(relayed, shares=(relayed.shares[0], *relayed.shares)),
        ),
        "relayed_secrets_bad_two_seeds": bad_message(
            "two HE seeds for one site", "RelayedSecrets", changed(relayed, seeds=(first, second))
        ),
        "sealed_shares_bad_box_length": bad_message(
            "a box of one share only", "SealedShares", changed(boxes[0], box=bytes(61))
        ),
        "survivors_bad_unsorted": bad_message(
            "not in order", "Survivors", changed(survivors, sites=SITES[::-1])
        ),
        "survivors_bad_repeated_site": bad_message(
            "an update counted twice", "Survivors", changed(survivors, sites=(SITES[0], *SITES))
        ),
        "survivors_bad_single_site": bad_message(
            "an update, not a sum", "Survivors", changed(survivors, sites=SITES[:1])
        ),
        "confirmations_bad_repeated_site": bad_message(
            "one site confirms for two",
            "Confirmations",
            changed(Confirmations(confirmations), items=(confirmations[0], *confirmations)),
        ),
        "confirmations_bad_none": bad_message(
            "nobody confirms", "Confirmations", changed(Confirmations(confirmations), items=())
        ),
        "released_shares_bad_both_shares_of_a_site": bad_message(
            "both shares of one site take both of its masks off: never",
            "ReleasedShares",
            changed(shares, mask=(ReleasedShare(SITES[1], bytes(33)), *shares.mask)),
        ),
        "released_shares_bad_repeated_owner": bad_message(
            "two shares of one seed from one site",
            "ReleasedShares",
            changed(shares, own=(shares.own[0], *shares.own)),
        ),
        "opening_tag_bad_short_tag": bad_message(
            "31 bytes of tag", "OpeningTag", changed(told, tag=told.tag[:-1])
        ),
        "released_shares_bad_unsorted": bad_message(
            "not in order", "ReleasedShares", changed(shares, own=shares.own[::-1])
        ),
        "released_shares_bad_short_share": bad_message(
            "32 bytes of share",
            "ReleasedShares",
            changed(shares, mask=(["ReleasedShare", SITES[2], bytes(32)],)),
        ),
    }


def with_coefficient(wire: bytes, index: int, value: int) -> bytes:
    """A ciphertext with one coefficient replaced."""
    c0 = unpack(np.frombuffer(wire[SEED_BYTES:], np.uint8), BFV_SLOTS, BFV.upload_bits)
    c0[index] = value
    return wire[:SEED_BYTES] + pack(c0, BFV.upload_bits).tobytes()


def no_coefficient(cut: int) -> int:
    """The least number that is not the high bits of a coefficient below q."""
    return ((MODULUS - 1 + (1 << cut >> 1)) >> cut) + 1


def bad_ciphertexts() -> Vectors:
    """Ciphertexts, sums and openings with one broken part each."""
    stored = bfv()
    wire, total = bytes.fromhex(stored["ciphertexts"][0]), bytes.fromhex(stored["sum"])
    packed = np.frombuffer(total[: -3 * SEED_BYTES], np.uint8)
    broken = unpack(packed, BFV_SLOTS, BFV.sum_bits)
    broken[3] = no_coefficient(BFV.sum_cut)

    def ciphertext(what: str, data: bytes, slots: int = BFV_SLOTS) -> dict[str, Any]:
        given = {"plain_bits": BFV_BITS, "additions": 3, "slots": slots, "bytes": data.hex()}
        return bad(what, "Sum.add", "MalformedMessageError", **given)

    def opening(what: str, error: str, data: bytes, contributions: int) -> dict[str, Any]:
        key = {"seed": stored["seed"], "plain_bits": BFV_BITS, "additions": 3}
        given = {"slots": BFV_SLOTS, "contributions": contributions, "bytes": data.hex()}
        return bad(what, "SecretKey.open", error, **key, **given)

    return {
        "ciphertext_bad_coefficient_not_below_q": ciphertext(
            "coefficient 7 is q", with_coefficient(wire, 7, no_coefficient(BFV.upload_cut))
        ),
        "ciphertext_bad_truncated": ciphertext("a byte is missing", wire[:-1]),
        "ciphertext_bad_trailing_byte": ciphertext("a byte too many", wire + b"\0"),
        "ciphertext_bad_whole_last_block": ciphertext(
            "the last block ships more than is in use", wire + bytes(BFV.block_bytes - len(wire))
        ),
        "ciphertext_bad_all_zero_block": ciphertext(
            "a transparent block", wire[:SEED_BYTES] + bytes(len(wire) - SEED_BYTES)
        ),
        "ciphertext_bad_spare_bits": ciphertext(
            "the spare bits of 19 slots are set",
            wire[: BFV.upload_bytes(19) - 1] + b"\xff",
            slots=19,
        ),
        "sum_bad_truncated": opening(
            "a byte is missing", "MalformedMessageError", total[:-1], len(SITES)
        ),
        "sum_bad_seed_missing": opening(
            "fewer seeds than contributions", "MalformedMessageError", total[:-64], len(SITES)
        ),
        "sum_bad_coefficient_not_below_q": opening(
            "coefficient 3 is q",
            "MalformedMessageError",
            pack(broken, BFV.sum_bits).tobytes() + total[-3 * SEED_BYTES :],
            len(SITES),
        ),
        "sum_bad_too_many_contributions": opening(
            "more than the key's bound proves",
            "ProtocolError",
            total + bytes.fromhex(stored["ciphertexts"][0])[:SEED_BYTES],
            4,
        ),
        "sum_bad_no_contributions": opening("a sum of nothing", "ProtocolError", b"", 0),
    }


def bad_others() -> Vectors:
    """A box, a signature, packed bits and an opened sum, broken."""
    box, signature, fixed = sealed_box(), signature_parts(), encoding()
    flipped = bytearray.fromhex(box["box"])
    flipped[-1] ^= 1
    return {
        "sealed_box_bad_tag": bad(
            "the last bit of the tag", "unseal", "ProtocolError", **{**box, "box": flipped.hex()}
        ),
        "sealed_box_bad_context": bad(
            "moved to another round",
            "unseal",
            "ProtocolError",
            **{**box, "context": b"another".hex()},
        ),
        "sealed_box_bad_low_order_key": bad(
            "a public key of low order",
            "unseal",
            "ProtocolError",
            **{**box, "maker_public": bytes(32).hex()},
        ),
        "signature_bad_phase": bad(
            "signed for another phase",
            "Roster.verify",
            "ProtocolError",
            **{**signature, "phase": "open"},
        ),
        "signature_bad_boundary": bad(
            "the same bytes, cut elsewhere",
            "Roster.verify",
            "ProtocolError",
            **{**signature, "said": ["".join(signature["said"]), ""]},
        ),
        "bitpacking_bad_spare_bits": bad(
            "a bit after the last value", "unpack", "ValueError", bits=5, count=3, bytes="ffff"
        ),
        "bitpacking_bad_length": bad(
            "a byte too many", "unpack", "ValueError", bits=5, count=3, bytes="ff7f00"
        ),
        "share_bad_not_in_the_field": bad(
            "the prime itself", "Share.parse", "ValueError", bytes=f"{shamir.PRIME:066x}"
        ),
        "share_bad_length": bad("a byte missing", "Share.parse", "ValueError", bytes="00" * 32),
        "decoding_bad_count": bad(
            "a sum of two in the name of three",
            "FixedPoint.decode",
            "ProtocolError",
            total=fixed["total"],
            contributors=SITES,
        ),
        "decoding_bad_weight_zero": bad(
            "nothing to average",
            "FixedPoint.decode",
            "ProtocolError",
            total=[2, 0, *fixed["total"][2:]],
            contributors=SITES[:2],
        ),
        "decoding_bad_weight_above_the_cap": bad(
            "more than n * W",
            "FixedPoint.decode",
            "ProtocolError",
            total=[2, 13, *fixed["total"][2:]],
            contributors=SITES[:2],
        ),
    }


def main(folder: Path) -> None:
    """Write every vector into `folder`."""
    everything = known_answers() | bad_messages() | bad_ciphertexts() | bad_others()
    for name, content in everything.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
