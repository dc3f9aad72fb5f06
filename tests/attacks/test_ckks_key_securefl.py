"""ckks-key on securefl's own ckks: it reads the wire rightly, and what it gets is not enough."""

import struct

import numpy as np
import pytest

from attacks import ckks_key, ring, shared_key
from attacks.ckks_key import DEGREE, SECUREFL_SCALE, Block, KeyTruth, _Expander, _first_prime
from attacks.rehearsal import gaussian_updates, rehearse
from attacks.ring import Ring
from attacks.view import Given
from protocols.messages import SumToOpen
from securefl.messages import Request

ckks = pytest.importorskip("protocols.ckks")


@pytest.fixture(scope="module")
def made():
    # Updates of 0, so that the sum, 3 in the count's slot alone, is small modulo one prime too.
    return rehearse("ckks", gaussian_updates(0, 2, 3, 200, deviation=0.0), 0)


@pytest.fixture(scope="module")
def raw(made):
    """Round 1: its ciphertext, its secret in NTT form, and its sum before any flooding."""
    view = made.colluding(("site-1",))
    [training, _] = shared_key.trainings(view.public, view.crossings)
    [friend] = view.recordings
    seed = shared_key.leaked_seed(training.begin, friend, view.crossings)
    words = struct.unpack("<8Q", seed.derive("ckks secret key", size=64))
    secret = ckks.seal.KeyGenerator(ckks._context(list(words))).secret_key()
    body = ckks_key._saved(secret)
    one = Ring(DEGREE, _first_prime())
    s = np.frombuffer(body, np.uint64, DEGREE, 48 + 16 + 8)
    [asked, *_] = [
        x.data for x in view.crossings if (x.number, x.phase, x.direction) == (1, "open", "down")
    ]
    total = SumToOpen.from_bytes(Request.from_bytes(asked).body)
    [(c0, c1)] = list(_Expander()(total.payload, len(total.contributors)))
    plain = (c0 + one.product(c1, s)) % np.uint64(one.prime)
    return training, one, c0, c1, s, one.signed(one.backward(plain))


def test_what_it_takes_for_the_ciphertext_decrypts_to_the_sum(raw):
    *_, plain = raw
    found = ring.slots(plain / SECUREFL_SCALE).real
    np.testing.assert_allclose(found, [3.0] + [0.0] * (DEGREE // 2 - 1), atol=1e-9)
    assert np.abs(found[1:]).max() > 0  # the error, which flooding hides


def test_at_this_scale_even_doubles_as_seal_decodes_them_are_too_coarse_for_it(raw):
    # 2^60 leaves a double no room for the last bits of a coefficient: no flooding is needed here.
    _, one, c0, c1, _, plain = raw
    slots = ring.slots(plain / SECUREFL_SCALE)
    block = Block(c0, c1, slots, np.zeros(DEGREE // 2), SECUREFL_SCALE)
    assert ckks_key.solve(one, [block], 1) is None
    lost = np.rint(ring.coefficients(slots) * SECUREFL_SCALE) - plain
    assert np.abs(lost).max() >= 1


def test_with_what_is_handed_out_it_has_not(made):
    found = ckks_key.adversary(made.view, Given(), 0, lambda _: None)
    told = ckks_key.score(found, KeyTruth(None, ()), 0)
    assert found.blocks >= 2
    assert found.blur > 1  # the error of encryption alone, before any flooding
    assert not told.succeeded
    assert told.p == 1


def test_rounded_to_whole_numbers_they_do_not_give_it_even_without_flooding(raw):
    # What is left is the sum itself, without the error that it was encrypted with.
    _, one, c0, c1, _, plain = raw
    slots = np.rint(ring.slots(plain / SECUREFL_SCALE))
    block = Block(c0, c1, slots, np.zeros(DEGREE // 2), SECUREFL_SCALE)
    assert ckks_key.solve(one, [block], 1) is None
