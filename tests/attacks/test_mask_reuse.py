"""mask-reuse: what is used twice shows, and what is fresh does not."""

import msgspec
import numpy as np
import pytest

from attacks import mask_reuse
from attacks.attack import Profile, guess
from attacks.mask_reuse import ATTACK, _trial, _unmasked, rehearsed, reusing
from attacks.rehearsal import gaussian_updates, rehearse
from attacks.shared_key import trainings, uploads
from attacks.view import Given
from protocols.bfv import Parameters, SecretKey
from protocols.bitpacking import pack, unpack
from protocols.catalogue import UPLOAD
from protocols.keystream import Seed
from securefl.config import Encryption, Experiment
from securefl.messages import Answer


def tried(trial, seed=0):
    found = mask_reuse.adversary(trial.view, Given(), seed, lambda _: None)
    return found, mask_reuse.score(found, trial.truth, seed)


@pytest.mark.parametrize("seed", range(3))
def test_a_mask_used_twice_gives_the_difference_of_two_updates_away(seed):
    found, told = tried(ATTACK.undefended(seed, Profile.quick))
    assert told.succeeded
    assert told.p < 1e-12
    assert told.results[1].value == 1.0  # the difference was read bit for bit
    assert found.worst.site == found.worst.other_site == "site-2"
    assert {found.worst.number, found.worst.other_number} == {1, 3}


@pytest.mark.parametrize(
    ("protocol", "leaked"),
    [("secagg", False), ("secagg", True), ("masked-bfv", True), ("masked-bfv", False)],
)
def test_fresh_masks_and_ciphertexts_pass(protocol, leaked):
    found, told = tried(_trial(rehearsed(protocol, 0, Profile.quick), leaked))
    assert not told.succeeded
    assert told.results[1].value < 0.1
    assert bool(found.vectors) == (protocol == "secagg" or leaked)
    assert found.unmasked == (0 if not found.vectors else 9 if leaked else 12)
    assert found.repeated_seeds == 0


def test_pairwise_masks_used_twice_show_once_the_server_takes_the_fresh_self_masks_off():
    made = rehearsed("secagg", 5, Profile.quick)
    site, rounds = "site-3", trainings(made.view.public, made.view.crossings)
    slots = {x.number: x.slots.numpy() for x in made.recordings[site].contributed}
    first, then = rounds[0], rounds[2]
    bits = first.encoding.plain_bits

    def masked(training):
        data = uploads(made.view.crossings, training.number)[site].payload
        return unpack(np.frombuffer(data, np.uint8), training.slots, bits)

    def bare(training):
        return _unmasked(made.view, training, {site: masked(training)})[site]

    reused = masked(then) - bare(then) + bare(first) - slots[1] + slots[3]
    reused &= np.uint64((1 << bits) - 1)
    said = uploads(made.view.crossings, 3)[site]
    said = msgspec.structs.replace(said, payload=pack(reused, bits).tobytes())
    crossings = [
        msgspec.structs.replace(x, data=Answer(said.to_bytes()).to_bytes())
        if (x.number, x.phase, x.site, x.direction) == (3, UPLOAD, site, "up")
        else x
        for x in made.view.crossings
    ]
    found, told = tried(_trial(made.with_crossings(crossings), leaked=False))
    assert found.worst.kind == "unmasked"
    assert told.succeeded
    assert told.results[1].value == 1.0


def test_two_friends_of_three_are_no_proof_against_the_masks():
    # Their own vectors off the sum leave the third's: that is no mask used twice.
    made = rehearse("masked-bfv", gaussian_updates(0, 2, 3, 30), 0)
    view = made.colluding(("site-1", "site-2"))
    trial = type(_trial(made, leaked=True))(view, _trial(made, leaked=True).truth)
    found, told = tried(trial)
    assert found.vectors == 2
    assert found.unmasked == 0
    assert not told.succeeded


def test_a_vector_without_any_mask_is_found():
    made = rehearsed("secagg", 0, Profile.quick)
    site, bits = "site-1", trainings(made.view.public, made.view.crossings)[0].encoding.plain_bits
    slots = made.recordings[site].contributed[0].slots.numpy()
    said = uploads(made.view.crossings, 1)[site]
    said = msgspec.structs.replace(said, payload=pack(slots, bits).tobytes())
    crossings = [
        msgspec.structs.replace(x, data=Answer(said.to_bytes()).to_bytes())
        if (x.number, x.phase, x.site, x.direction) == (1, UPLOAD, site, "up")
        else x
        for x in made.view.crossings
    ]
    found, told = tried(_trial(made.with_crossings(crossings), leaked=False))
    assert told.succeeded
    assert (found.worst.site, found.worst.other_site) == (site, "")
    assert told.results[1].value == 1.0


def test_two_uploads_whose_ciphertexts_share_a_seed_give_their_difference_away():
    made = rehearsed("bfv", 0, Profile.quick)
    training = trainings(made.view.public, made.view.crossings)[0]
    parts = {s: x.payload for s, x in uploads(made.view.crossings, 1).items()}
    slots = {s: x.contributed[0].slots.numpy() for s, x in made.recordings.items()}
    parameters = Parameters(training.encoding.plain_bits, training.encoding.cohort)
    # site-2's c0 again, moved to what site-3 contributed: as if both had drawn one seed and error.
    c0 = unpack(
        np.frombuffer(parts["site-2"][64:], np.uint8),
        training.slots,
        parameters.upload_bits,
    )
    modulus, p = 18014398509404161, parameters.plain_bits
    moved = []
    for old, a, b in zip(
        c0.tolist(), slots["site-2"].tolist(), slots["site-3"].tolist(), strict=True
    ):
        exact = (old << parameters.upload_cut) + ((b - a) * modulus + (1 << (p - 1)) >> p)
        moved.append((exact % modulus) >> parameters.upload_cut)
    data = parts["site-2"][:64]
    data += pack(np.array(moved, np.uint64), parameters.upload_bits).tobytes()
    said = msgspec.structs.replace(uploads(made.view.crossings, 1)["site-3"], payload=data)
    crossings = [
        msgspec.structs.replace(x, data=Answer(said.to_bytes()).to_bytes())
        if (x.number, x.phase, x.site, x.direction) == (1, UPLOAD, "site-3", "up")
        else x
        for x in made.view.crossings
    ]
    found, told = tried(_trial(made.with_crossings(crossings), leaked=False))
    assert found.repeated_seeds == 1
    assert found.worst.kind == "ciphertexts"
    assert told.succeeded
    assert told.p == 0
    assert told.results[1].value == 1.0


def test_two_encryptions_under_one_key_never_share_a_seed():
    key = SecretKey(Seed(bytes(64)), Parameters(40, 4))
    seeds = {bytes(key.encrypt([np.zeros(1, np.uint64)]))[:64] for _ in range(20)}
    assert len(seeds) == 20


def test_the_adversary_needs_the_bytes_of_its_view_alone():
    trial = _trial(reusing(rehearsed("secagg", 1, Profile.quick), "site-1", 1, 2), leaked=False)
    [found] = guess(ATTACK, [trial], 0)
    assert mask_reuse.score(found, trial.truth, 0).succeeded


@pytest.mark.parametrize("protocol", ["plain", "bfv", "secagg", "masked-bfv"])
def test_it_is_claimed_of_every_protocol_but_plain(protocol):
    claim = ATTACK.claim(Experiment(protocol=Encryption(name=protocol)))
    assert claim.made == (protocol != "plain")
