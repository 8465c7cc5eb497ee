import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import philox, rng
from specdec.rng import DRAFT, TARGET, gumbel, gumbel_argmax, gumbel_torch, uniforms

torch.set_num_threads(1)

U64 = st.integers(0, 2**64 - 1)

# Known answers of Philox4x32-10 published with the Random123 library: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hex_words(text):
    return [int(word, 16) for word in text.split()]


def philox_oracle(counter, key):
    """Philox4x32-10 in Python integers, as the paper writes it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def words(seed, position, num, stream=TARGET):
    """The raw words behind a row, from the compiled implementation."""
    out = np.empty((num + 3) // 4 * 4, dtype=np.uint32)
    key, place = rng._words_of("seeds", [seed])[0], rng._words_of("positions", [position])[0]
    philox.fill_words(key, np.uint32(stream), place[0], place[1], out)
    return out[:num]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter, key, answer):
    c = [torch.tensor([word]) for word in hex_words(counter)]
    k = tuple(torch.tensor([word]) for word in hex_words(key))
    assert [int(word) for word in philox.philox_torch(tuple(c), k)] == hex_words(answer)
    assert philox_oracle(hex_words(counter), hex_words(key)) == hex_words(answer)


def test_the_compiled_words_of_counter_zero_are_the_published_ones():
    assert words(0, 0, 4).tolist() == hex_words(KNOWN_ANSWERS[0][2])


@settings(max_examples=30, deadline=None)
@given(seed=U64, position=U64, stream=st.integers(0, 2**32 - 1), block=st.integers(0, 5))
def test_seed_position_stream_and_block_sit_in_their_documented_words(seed, position, stream, block):
    counter = (block, stream, position & 0xFFFFFFFF, position >> 32)
    expected = philox_oracle(counter, (seed & 0xFFFFFFFF, seed >> 32))
    assert words(seed, position, 24, stream)[4 * block : 4 * block + 4].tolist() == expected


@settings(max_examples=40, deadline=None)
@given(
    keys=st.lists(st.tuples(U64, U64), min_size=1, max_size=4), vocab_size=st.integers(1, 70), stream=st.integers(0, 3)
)
def test_the_two_implementations_agree_bit_for_bit(keys, vocab_size, stream):
    seeds, positions = [k[0] for k in keys], [k[1] for k in keys]
    compiled = gumbel(seeds, positions, vocab_size, device="cpu", stream=stream)
    plain = gumbel_torch(seeds, positions, vocab_size, device="cpu", stream=stream)
    assert compiled.dtype == plain.dtype == torch.float32
    assert compiled.shape == (len(keys), vocab_size)
    assert torch.equal(compiled.view(torch.int32), plain.view(torch.int32))


def test_the_two_implementations_agree_over_a_large_vocabulary_and_several_slabs(monkeypatch):
    monkeypatch.setattr(rng, "_SLAB", 40_000)
    seeds, positions = [3, 2**63 + 5, 3, 4], [0, 2**32, 2**33 - 1, 10]
    assert torch.equal(
        gumbel(seeds, positions, 20_011, device="cpu"), gumbel_torch(seeds, positions, 20_011, device="cpu")
    )


@pytest.mark.gpu
def test_the_noise_is_the_same_on_the_gpu():
    seeds, positions = [3, 2**64 - 1, 3], [0, 2**32, 2**33 - 1]
    on_gpu = gumbel(seeds, positions, 151_936, device="cuda")
    assert on_gpu.device.type == "cuda"
    assert torch.equal(on_gpu.cpu(), gumbel(seeds, positions, 151_936, device="cpu"))
    assert torch.equal(uniforms(seeds, positions, 9, device="cuda").cpu(), uniforms(seeds, positions, 9, device="cpu"))


def log_arguments():
    """Every region the transform visits: tiny, near 1 from both sides, around the exponent switch, large."""
    draws = (words(11, 12, 20_000).astype(np.float64) + 0.5) * 2.0**-32
    near_one = 1.0 + np.concatenate([-draws[:4000] * 2.0**-20, draws[:4000] * 2.0**-20, -draws[:4000] * 2.0**-31])
    half = math.sqrt(0.5) * (1 + np.arange(-50, 50) * 2.0**-52)
    return np.concatenate(
        [draws, near_one, half, 2 * half, draws * 23, draws * 2.0**-32, [1.0, 2.0**-33, 1 - 2.0**-33]]
    )


def test_the_logarithm_is_within_one_ulp_of_the_library_in_both_implementations():
    x = log_arguments()
    expected = np.array([math.log(value) for value in x])
    plain = philox.log_torch(torch.from_numpy(x)).numpy()
    compiled = np.array([philox.log(value) for value in x])
    assert (plain.view(np.int64) == compiled.view(np.int64)).all()
    assert (np.abs(plain - expected) <= np.spacing(np.abs(expected))).all()
    assert philox.log(1.0) == 0.0


def test_the_noise_is_the_double_logarithm_of_the_documented_uniform():
    row = gumbel([5], [6], 500, device="cpu")[0].numpy()
    expected = [-math.log(-math.log1p(-(float(word) + 0.5) * 2.0**-32)) for word in words(5, 6, 500)]
    assert np.abs(row - np.array(expected, dtype=np.float32)).max() <= 5e-7  # one float32 ulp at the largest value


def test_the_extreme_words_give_the_documented_range():
    x = torch.tensor([0.0, 2.0**32 - 1], dtype=torch.float64)
    noise = -philox.log_torch(-philox.log_torch(1.0 - (x + 0.5) * 2.0**-32))
    assert noise[0] == pytest.approx(33 * math.log(2), abs=1e-9)
    assert noise[1] == pytest.approx(-math.log(33 * math.log(2)), abs=1e-9)


@pytest.mark.parametrize(
    "other", [(7, 101, 0), (7, 99, 0), (8, 100, 0), (7, 100 + 2**32, 0), (7 + 2**32, 100, 0), (7, 100, 1)]
)
def test_neighbouring_streams_share_no_block(other):
    seed, position, stream = other
    mine = {tuple(block) for block in words(7, 100, 40_000).reshape(-1, 4).tolist()}
    theirs = {tuple(block) for block in words(seed, position, 40_000, stream).reshape(-1, 4).tolist()}
    assert len(mine) == len(theirs) == 10_000
    assert not mine & theirs


def test_neighbouring_rows_are_uncorrelated():
    noise = gumbel([1, 1, 2, 1], [50, 51, 50, 50 + 2**32], 40_000, device="cpu").double()
    off_diagonal = torch.corrcoef(noise) - torch.eye(4, dtype=torch.float64)
    assert off_diagonal.abs().max() < 4.5 / math.sqrt(40_000)  # 4.5 standard errors


def test_batch_order_and_batch_size_do_not_matter():
    seeds, positions = [4, 9, 4, 2**64 - 1], [8, 8, 7, 0]
    together = gumbel(seeds, positions, 33, device="cpu")
    order = [2, 0, 3, 1]
    shuffled = gumbel([seeds[i] for i in order], [positions[i] for i in order], 33, device="cpu")
    assert torch.equal(shuffled, together[order])
    for row in range(4):
        assert torch.equal(gumbel(seeds[row : row + 1], positions[row : row + 1], 33, device="cpu")[0], together[row])


def test_a_shorter_vocabulary_reads_the_start_of_the_same_row():
    assert torch.equal(gumbel([1], [2], 9, device="cpu"), gumbel([1], [2], 50, device="cpu")[:, :9])


def test_a_stream_is_another_noise():
    a, b = gumbel([1], [2], 64, device="cpu", stream=TARGET), gumbel([1], [2], 64, device="cpu", stream=DRAFT)
    assert not torch.equal(a, b)


def test_the_law_is_gumbel_by_kolmogorov_smirnov_and_moments():
    noise = gumbel(list(range(40)), list(range(40)), 5_000, device="cpu").double().flatten().sort().values
    n = len(noise)
    cdf = torch.exp(-torch.exp(-noise))
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cdf - steps[:-1]).abs().max(), (steps[1:] - cdf).abs().max())
    assert distance * math.sqrt(n) < 2.23  # p = 1e-4
    spread = math.pi / math.sqrt(6)
    assert abs(noise.mean() - 0.5772156649) < 4 * spread / math.sqrt(n)
    assert abs(noise.std() - spread) < 4 * spread * math.sqrt(4.4 / 4 / n)  # Gumbel: excess kurtosis 2.4


def test_the_argmax_of_log_law_plus_noise_follows_the_law_by_chi_square():
    law = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    n = 40_000
    drawn = (law.log() + gumbel([77] * n, list(range(n)), 6, device="cpu")).argmax(-1)
    counts = torch.bincount(drawn, minlength=6).double()
    expected = law.double() * n
    assert ((counts - expected) ** 2 / expected).sum() < 25.74  # 5 degrees of freedom, p = 1e-4


@settings(max_examples=60)
@given(
    data=st.data(),
    vocab_size=st.integers(1, 600),
    spread=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    round_to=st.sampled_from([0.25, 1e-6]),
    share_banned=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
)
def test_the_draw_is_the_argmax_of_scores_plus_noise(data, vocab_size, spread, round_to, share_banned):
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    scores = generator.normal(0, spread, size=(3, vocab_size)).astype(np.float32)
    scores = np.round(scores / np.float32(round_to)) * np.float32(round_to)
    scores[generator.random(scores.shape) < share_banned] = -np.inf
    seeds, positions = (
        data.draw(st.lists(U64, min_size=3, max_size=3)),
        data.draw(st.lists(U64, min_size=3, max_size=3)),
    )
    scores = torch.from_numpy(scores)
    expected = (scores + gumbel(seeds, positions, vocab_size, device="cpu")).argmax(-1)
    assert torch.equal(gumbel_argmax(scores, seeds, positions), expected)


def test_the_draw_from_a_large_vocabulary_is_the_argmax_of_scores_plus_noise():
    seeds, positions = [5] * 8, list(range(8))
    for scores in (torch.zeros(8, 60_001), gumbel([9] * 8, positions, 60_001, device="cpu", stream=DRAFT) * 4):
        expected = (scores + gumbel(seeds, positions, 60_001, device="cpu")).argmax(-1)
        assert torch.equal(gumbel_argmax(scores, seeds, positions), expected)


def test_no_word_has_more_noise_than_its_bound_says():
    powers = 2 ** np.arange(32, dtype=np.int64)
    near = np.concatenate([powers + step for step in (-2, -1, 0, 1, 2)])
    tried = np.concatenate([near[(near >= 0) & (near < 2**32)].astype(np.uint32), words(1, 2, 20_000)])
    slack = [
        float(philox._BOUND_OFFSET - philox._BOUND_SLOPE * np.float32(np.float32(word).view(np.int32)))
        - float(philox.noise(word))
        for word in tried
    ]
    assert min(slack) > 5e-4  # half of the margin


@pytest.mark.gpu
def test_the_draw_is_the_same_on_the_gpu():
    scores = gumbel([9] * 6, list(range(6)), 151_936, device="cpu", stream=DRAFT) * 4
    seeds, positions = [3, 3, 3, 2**64 - 1, 4, 3], [8, 8, 9, 2**40, 0, 8]
    drawn = gumbel_argmax(scores.cuda(), seeds, positions)
    assert torch.equal(drawn.cpu(), gumbel_argmax(scores, seeds, positions))


def test_uniforms_are_the_words_in_the_open_unit_interval():
    row = uniforms([5], [6], 10, device="cpu", stream=DRAFT)
    assert row.dtype == torch.float64
    assert row[0].tolist() == [(float(word) + 0.5) * 2.0**-32 for word in words(5, 6, 10, DRAFT)]
    assert ((row > 0) & (row < 1)).all()


def test_numpy_keys_mean_the_same_as_lists():
    expected = gumbel([2**63 + 1, 5], [3, 4], 8, device="cpu")
    seeds = np.array([2**63 + 1, 5], dtype=np.uint64)
    assert torch.equal(gumbel(seeds, np.array([3, 4], dtype=np.int32), 8, device="cpu"), expected)


def test_no_rows_give_an_empty_tensor():
    assert gumbel([], [], 5, device="cpu").shape == (0, 5)
    assert gumbel_torch([], [], 5, device="cpu").shape == (0, 5)


@pytest.mark.parametrize(
    ("seeds", "positions", "stream", "message"),
    [
        ([-1], [0], 0, r"seeds must be in \[0, 2\*\*64\), got \[-1\]"),
        ([2**64], [0], 0, r"seeds must be in \[0, 2\*\*64\)"),
        ([0], np.array([-3], dtype=np.int32), 0, r"positions must be in \[0, 2\*\*64\)"),
        ([0, 1], [0], 0, "two lists of one length, got 2 and 1"),
        ([0], [0], 2**32, r"stream must be in \[0, 2\*\*32\), got 4294967296"),
    ],
)
@pytest.mark.parametrize("make", [gumbel, gumbel_torch])
def test_keys_outside_their_range_are_refused(make, seeds, positions, stream, message):
    with pytest.raises(ValueError, match=message):
        make(seeds, positions, 4, device="cpu", stream=stream)
