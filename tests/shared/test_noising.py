"""Noise: keyed, order-free, unbiased and evenly spread (docs/math.md: Noise, CompDemo)."""

import numpy as np
import pytest
from tide.shared.config import NoiseConfig
from tide.shared.noising import Units, draw_masks, keyed_generator, masking_units, timesteps
from tide.teacher_dump.views import passes

# Teacher start, end, student start, end: one to one, two to one, one to two, three to three.
CHUNKS = np.array([[2, 3, 3, 4], [3, 5, 4, 5], [5, 6, 5, 7], [6, 9, 7, 10]], np.int32)


def make_units() -> Units:
    """12 student tokens (prompt 3), 11 teacher tokens (prompt 2); the last two of each side lie in no chunk."""
    return masking_units(CHUNKS, 12, 3, 11, 2)


def views_of(sample: int, noise: NoiseConfig) -> list:
    times = enumerate(timesteps(sample, f"s{sample}", noise))
    masks = [draw_masks(make_units(), t, f"s{sample}", view, noise) for view, t in times]
    return [np.concatenate([m.student, m.teacher_a, m.teacher_b]) for m in masks]


def kolmogorov(u: np.ndarray) -> float:
    """Largest distance between the empirical distribution and the uniform one."""
    u, n = np.sort(u), len(u)
    return float(max((np.arange(1, n + 1) / n - u).max(), (u - np.arange(n) / n).max()))


def test_units_number_chunks_first_then_lone_tokens_and_leave_prompts_out() -> None:
    units = make_units()
    assert units.student.tolist() == [-1, -1, -1, 0, 1, 2, 2, 3, 3, 3, 4, 5]
    assert units.teacher.tolist() == [-1, -1, 0, 1, 1, 2, 3, 3, 3, 6, 7]
    assert (units.num_chunks, units.num_units) == (4, 8)


@pytest.mark.parametrize("unit", ["chunk", "token"])
@pytest.mark.parametrize("steps", ["stratified", "uniform"])
def test_the_same_view_has_the_same_noise_in_any_order(unit, steps) -> None:
    noise = NoiseConfig(seed=5, views=4, unit=unit, timesteps=steps)
    forwards = {sample: views_of(sample, noise) for sample in range(9)}
    backwards = {sample: views_of(sample, noise) for sample in reversed(range(9))}
    np.random.seed(0)
    for sample in (7, 0, 3):
        for view in range(4):
            np.testing.assert_array_equal(forwards[sample][view], backwards[sample][view])
    np.testing.assert_array_equal(views_of(3, noise), forwards[3])


def test_views_samples_seeds_and_purposes_draw_independently() -> None:
    keys = [(0, "a", 0, "mask"), (0, "a", 1, "mask"), (0, "b", 0, "mask"), (1, "a", 0, "mask"), (0, "a", 0, "demo")]
    draws = np.stack([keyed_generator(*key).random(10_000) for key in keys])
    correlation = np.corrcoef(draws) - np.eye(len(keys))
    assert np.abs(correlation).max() < 0.05  # 5 standard errors of 1 / sqrt(10^4)


def many_units() -> tuple[Units, np.ndarray]:
    """500 lone student tokens and 500 chunks of one, two or three student tokens; the length of each token's unit."""
    lengths = np.tile([1, 2, 3, 2], 125)
    ends = np.cumsum(lengths) + 7
    numbers = np.arange(500)
    chunks = np.stack([numbers, numbers + 1, ends - lengths, ends], axis=1).astype(np.int32)
    units = masking_units(chunks, 7 + int(lengths.sum()) + 500, 7, 500, 0)
    return units, np.concatenate([np.zeros(7, int), np.repeat(lengths, lengths), np.ones(500, int)])


def mask_counts(t: float, noise: NoiseConfig, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each student and each teacher token is masked in `draws` draws over `many_units`."""
    units, _ = many_units()
    masks = [draw_masks(units, t, f"s{i}", 0, noise) for i in range(draws)]
    return np.sum([m.student for m in masks], axis=0), np.sum([m.teacher_a | m.teacher_b for m in masks], axis=0)


@pytest.mark.parametrize("t", [1e-3, 0.3, 0.85, 1.0])
def test_under_chunk_masking_a_tokens_marginal_mask_probability_is_t(t: float) -> None:
    draws = 100
    counts, teacher_counts = mask_counts(t, NoiseConfig(seed=1), draws)
    units, lengths = many_units()
    assert not counts[:7].any(), "prompts are never masked"
    for length in (1, 2, 3):
        per_unit = counts[lengths == length].reshape(-1, length)
        assert (per_unit == per_unit[:, :1]).all() or length == 1, "chunks are masked whole"
    np.testing.assert_array_equal(teacher_counts, counts[[np.argmax(units.student == c) for c in range(500)]])
    # 1,000 units x 100 draws = 10^5 independent draws: five standard deviations of the binomial sum. Each unit alone:
    # 1,000 of them, so six, and four for the Poisson tail at t = 0.001.
    per_unit = np.concatenate([counts[7 + np.flatnonzero(np.diff(units.student[6:]))]])
    assert len(per_unit) == 1000
    deviation = np.sqrt(draws * t * (1 - t))
    assert abs(per_unit.sum() - 1000 * draws * t) <= 5 * np.sqrt(1000) * deviation
    assert (np.abs(per_unit - draws * t) <= 6 * deviation + 4).all()


def test_token_masking_follows_the_paper_chunks_with_a_masked_token_are_masked_whole() -> None:
    draws, t = 100, 0.3
    counts, teacher_counts = mask_counts(t, NoiseConfig(seed=1, unit="token"), draws)
    _, lengths = many_units()
    chunk_lengths = np.tile([1, 2, 3, 2], 125)
    for length, num_chunks in ((1, 125), (2, 250), (3, 125)):
        expected = 1 - (1 - t) ** length  # at least one of the tokens is drawn
        # A frequency over num_chunks x 100 independent chunks: five binomial standard deviations.
        tolerance = 5 * np.sqrt(expected * (1 - expected) / (num_chunks * draws))
        chunk_tokens = counts[7:-500][lengths[7:-500] == length]
        assert abs(chunk_tokens.mean() / draws - expected) < tolerance
        assert abs(teacher_counts[chunk_lengths == length].mean() / draws - expected) < tolerance
    assert abs(counts[-500:].mean() / draws - t) < 5 * np.sqrt(t * (1 - t) / 50_000)
    assert not counts[:7].any()


@pytest.mark.parametrize("unit", ["chunk", "token"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_comp_demo_halves_are_disjoint_and_cover_the_masked_set(unit, ratio: float) -> None:
    noise, units = NoiseConfig(seed=2, unit=unit, demo_ratio=ratio), make_units()
    in_a = masked = 0
    for i in range(200):
        masks = draw_masks(units, 0.6, f"s{i}", 0, noise)
        assert not (masks.teacher_a & masks.teacher_b).any()
        whole = draw_masks(units, 0.6, f"s{i}", 0, NoiseConfig(seed=2, unit=unit, comp_demo=False))
        np.testing.assert_array_equal(masks.teacher_a | masks.teacher_b, whole.teacher_b)
        np.testing.assert_array_equal(masks.student, whole.student)
        assert not whole.teacher_a.any()
        for chunk, (start, end, s_start, s_end) in enumerate(CHUNKS):
            active = chunk in masks.active_chunks
            assert masks.student[s_start:s_end].tolist() == [active] * (s_end - s_start)
            half = masks.teacher_a if masks.teacher_a[start] else masks.teacher_b
            assert half[start:end].tolist() == [active] * (end - start), "a chunk lies in one half"
        halves = [half for half in (masks.teacher_b, masks.teacher_a) if half[CHUNKS[:, 0]].any()]
        asked = passes(masks, CHUNKS)
        assert len(asked) == len(halves), "an empty half costs no pass"
        for (one, answered), half in zip(asked, halves, strict=True):
            np.testing.assert_array_equal(one, half)
            assert one[CHUNKS[answered, 0]].all()
        assert sorted(c for _, answered in asked for c in answered) == masks.active_chunks.tolist()
        in_a, masked = in_a + masks.teacher_a[CHUNKS[:, 0]].sum(), masked + len(masks.active_chunks)
    # Binomial over about 480 masked chunks: five standard deviations are 5 sqrt(0.25 / 480) = 0.11.
    assert abs(in_a / masked - ratio) < 0.11


@pytest.mark.parametrize("views", [1, 2, 3, 10])
def test_each_sample_and_each_view_of_consecutive_samples_sees_every_stratum_once(views: int) -> None:
    noise = NoiseConfig(seed=4, views=views)
    for square in range(5):
        t = np.stack([timesteps(square * views + row, "any", noise) for row in range(views)])
        strata = np.floor((t.astype(np.float64) - noise.t_min) / (noise.t_max - noise.t_min) * views).astype(int)
        for line in (*strata, *strata.T):
            assert sorted(line) == list(range(views))


@pytest.mark.parametrize(("views", "samples"), [(1, 100), (4, 200), (10, 200), (10, 1000)])
def test_within_an_epoch_times_are_spread_far_more_evenly_than_independent_draws(views: int, samples: int) -> None:
    noise = NoiseConfig(seed=3, views=views)
    u = np.stack([(timesteps(i, "", noise).astype(np.float64) - noise.t_min) / 0.999 for i in range(samples)])
    rng = np.random.default_rng(0)
    independent = np.mean([kolmogorov(rng.random(samples)) for _ in range(100)])
    distances = [kolmogorov(u[:, view]) for view in range(views)]
    # A Kronecker sequence of n points has discrepancy O(log n / n), independent draws 1 / sqrt(n).
    assert max(distances) < 0.35 * independent
    assert len(np.unique(u)) == u.size, "no two views share a time"


@pytest.mark.parametrize("steps", ["stratified", "uniform"])
def test_times_stay_within_their_range(steps) -> None:
    noise = NoiseConfig(seed=0, views=7, t_min=0.25, t_max=0.5, timesteps=steps)
    t = np.concatenate([timesteps(i, f"s{i}", noise) for i in range(300)])
    assert t.dtype == np.float32
    assert 0.25 <= t.min() < 0.26
    assert 0.49 < t.max() <= 0.5
    constant = NoiseConfig(views=3, t_min=1.0, t_max=1.0, timesteps=steps)
    assert timesteps(0, "s", constant).tolist() == [1.0, 1.0, 1.0]


def test_uniform_times_are_uniform_and_independent_of_the_plans_order() -> None:
    noise = NoiseConfig(seed=0, views=5, timesteps="uniform")
    t = np.stack([timesteps(i, f"s{i}", noise) for i in range(400)])
    np.testing.assert_array_equal(timesteps(99, "s7", noise), t[7])
    assert kolmogorov((t.ravel() - 1e-3) / 0.999) < 1.95 / np.sqrt(t.size)  # p = 0.001


def test_a_sample_without_units_or_without_a_teacher_draws_empty_masks() -> None:
    noise = NoiseConfig()
    nothing = masking_units(np.zeros((0, 4), np.int32), 0, 0)
    masks = draw_masks(nothing, 1.0, "s", 0, noise)
    assert (len(masks.student), len(masks.teacher_a), passes(masks, np.zeros((0, 4), int))) == (0, 0, [])
    alone = draw_masks(masking_units(np.zeros((0, 4), np.int32), 7, 2), 1.0, "s", 0, noise)
    assert alone.student.tolist() == [False] * 2 + [True] * 5
    assert len(alone.active_chunks) == 0


def test_noise_never_changes_silently_across_versions() -> None:
    """Golden values: a change here changes every cache made from the same plan."""
    drawn = keyed_generator(7, "sample", 3, "mask").random(3).tolist()
    assert drawn == [0.5077822305878229, 0.8778534623150349, 0.6170923866351995]
    noise, uniform = NoiseConfig(seed=7, views=4), NoiseConfig(seed=7, views=4, timesteps="uniform")
    stratified_t = [0.9710816740989685, 0.3489703834056854, 0.6138012409210205, 0.12736786901950836]
    assert timesteps(6, "sample", noise).tolist() == stratified_t
    uniform_t = [0.04412627965211868, 0.0380367673933506, 0.05838657543063164, 0.6860796809196472]
    assert timesteps(6, "sample", uniform).tolist() == uniform_t
    expected = {
        "chunk": ("000100011111", "00100000000", "00000011101"),
        "token": ("000101111111", "00100100000", "00000011101"),
    }
    for unit, bits in expected.items():
        masks = draw_masks(make_units(), 0.6, "sample", 3, NoiseConfig(seed=7, views=4, unit=unit))  # type: ignore[arg-type]
        for mask, text in zip((masks.student, masks.teacher_a, masks.teacher_b), bits, strict=True):
            assert "".join(map(str, mask.astype(int))) == text
