"""A dump's rows against a slow, obvious twin written from docs/math.md, and what a shard task refuses."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tide.shared.attention import block_diffusion_mask
from tide.shared.cache import ViewRow, open_cache
from tide.shared.config import RunConfig
from tide.shared.errors import DataError
from tide.shared.models import load_model
from tide.shared.noising import draw_masks, masking_units, timesteps
from tide.teacher_dump.dump import dump_teacher, prepare_plan
from tide.teacher_dump.plan import Plan, open_samples, read_plan
from tide.teacher_dump.shard_task import by_tokens
from tide.teacher_dump.teacher import Teacher
from tide.teacher_dump.worker import open_task
from tiny_runs import BLOCK, tiny_config

ATOL = 2e-5  # float32 rounding of the fast and the naive forward, summed over a chunk


def naive_answers(model, x_0: np.ndarray, masked: np.ndarray, mask_id: int) -> np.ndarray:
    """float64 log-probabilities [l, V] of one forward over [x_t, x_0], 2 l tokens, all logits."""
    ids = np.concatenate([np.where(masked, mask_id, x_0), x_0]).astype(np.int64)
    position = torch.arange(len(x_0)).repeat(2)[None]
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(ids)[None], position_ids=position, use_cache=False,
            attention_mask=block_diffusion_mask(len(x_0), BLOCK)[None, None],
        ).logits  # fmt: skip
    return logits[0, : len(x_0)].double().log_softmax(dim=1).numpy()


def shared_tokens(pairing) -> dict[int, int]:
    """teacher id -> student id of the same bytes: the lowest ordinary id, or an added one; mask tokens apart."""
    first: list[dict[bytes, int]] = []
    for side in (pairing.teacher, pairing.student):
        ids: dict[bytes, int] = {}
        for token_id in sorted(range(len(side.token_bytes)), key=lambda i: (i in side.bytes_of.added, i)):
            if side.token_bytes[token_id] and token_id != side.mask_id:
                ids.setdefault(side.token_bytes[token_id], token_id)
        first.append(ids)
    return {teacher_id: first[1][token] for token, teacher_id in first[0].items() if token in first[1]}


def twin_rows(plan: Plan, dense: dict[tuple[str, int, int], np.ndarray] | None = None) -> Iterator[ViewRow]:
    """The cache's rows, one view and one forward at a time.

    Args: dense: gains the teacher's log-probabilities by sample, view and student position of every target.
    """
    config, signal, noise = plan.config, plan.config.signal, plan.config.noise
    conversations, pairing = open_samples(plan)
    model, student_of = load_model(config.teacher.path), shared_tokens(pairing)
    support = sorted(student_of)
    for index, planned in enumerate(plan.samples):
        sample, sample_id = pairing.encode(conversations.read(*planned[:3])), planned.sample_id
        student, teacher = sample.student, sample.teacher
        units = masking_units(
            sample.chunks, len(student.x_0), student.prompt_tokens, len(teacher.x_0), teacher.prompt_tokens
        )
        for view, t in enumerate(timesteps(index, sample_id, noise)):
            masks = draw_masks(units, float(t), sample_id, view, noise)
            both = masks.teacher_a | masks.teacher_b
            first = naive_answers(model, teacher.x_0, masks.teacher_b, pairing.teacher.mask_id)
            second = naive_answers(model, teacher.x_0, masks.teacher_a, pairing.teacher.mask_id)
            logp = np.where(masks.teacher_b[:, None], first, np.where(masks.teacher_a[:, None], second, np.nan))
            row = {"chunk_start": [], "chunk_len": [], "chunk_logp": [], "target_position": []}
            row |= {"num_top": [], "top_ids": [], "top_logp": [], "log_tail": [], "log_buckets": []}
            for t_start, t_end, s_start, s_end in sample.chunks:
                if not masks.student[s_start:s_end].all():
                    assert not masks.student[s_start:s_end].any()
                    continue
                assert both[t_start:t_end].all()
                gold = [logp[i, teacher.x_0[i]] for i in range(t_start, t_end)]
                row["chunk_start"].append(s_start)
                row["chunk_len"].append(s_end - s_start)
                row["chunk_logp"].append(sum(gold))
                one_to_one = t_end - t_start == 1 and s_end - s_start == 1
                if (
                    signal.kind == "topk"
                    and one_to_one
                    and student_of.get(teacher.x_0[t_start]) == student.x_0[s_start]
                ):
                    inside = logp[t_start, support]
                    best = np.argsort(-inside, kind="stable")[: signal.top_k]
                    best = [i for n, i in enumerate(best) if n == 0 or np.exp(inside[i]) >= signal.min_probability]
                    row["target_position"].append(s_start)
                    if dense is not None:
                        dense[sample_id, view, s_start] = logp[t_start]
                    row["num_top"].append(len(best))
                    row["top_ids"] += [student_of[support[i]] for i in best]
                    row["top_logp"] += inside[best].tolist()
                    outside = np.delete(inside, best)
                    row["log_tail"].append(
                        [np.log(np.exp(outside / T).sum() / np.exp(inside / T).sum()) for T in signal.temperatures]
                    )
                    if signal.tail_buckets:
                        ids = [student_of[support[i]] for i in np.delete(np.arange(len(support)), best)]
                        bucket = np.array([sum(cut <= i for cut in signal.tail_buckets) for i in ids])
                        masses = [
                            [np.exp(outside / T)[bucket == b].sum() / np.exp(inside / T).sum() for b in range(3)]
                            for T in signal.temperatures
                        ]
                        row["log_buckets"].append(np.log(masses))
            response = masks.student[student.prompt_tokens :]
            arrays = {name: np.array(values) for name, values in row.items()}
            num_buckets = len(signal.tail_buckets) + 1 if signal.tail_buckets else 0
            arrays["log_buckets"] = (
                arrays["log_buckets"].reshape(-1, len(signal.temperatures), num_buckets)
                if num_buckets
                else np.zeros((len(row["num_top"]), len(signal.temperatures), 0))
            )
            yield ViewRow(sample_id, view, float(t), student.x_0, student.prompt_tokens, response, **arrays)


def check_rows(config: RunConfig, root: Path) -> list[ViewRow]:
    """Dump, then compare every row and field with the twin's."""
    dump_teacher(config, root)
    cache, plan = open_cache(root), read_plan(root).at(config, root)
    rows = list(cache)
    for row, twin in zip(rows, twin_rows(plan), strict=True):
        assert (row.sample_id, row.view, row.prompt_tokens) == (twin.sample_id, twin.view, twin.prompt_tokens)
        assert row.t == pytest.approx(twin.t)
        for name in ("x_0", "masked", "chunk_start", "chunk_len", "target_position", "num_top", "top_ids"):
            assert getattr(row, name).tolist() == getattr(twin, name).tolist(), name
        for name in ("chunk_logp", "gold_logp", "top_logp", "log_tail", "log_buckets"):
            got, expected = getattr(row, name), getattr(twin, name)
            np.testing.assert_allclose(got.ravel(), np.ravel(expected), atol=ATOL, rtol=0, err_msg=name)
    return rows


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"noise.comp_demo": False, "signal.top_k": 5, "signal.temperatures": [0.5, 1.0, 3.0]},
        {"signal.min_probability": 0.02, "noise.demo_ratio": 0.3, "teacher.tokens_per_batch": 100},
        {"signal.tail_buckets": [20, 150], "signal.top_k": 5, "signal.min_probability": 0.02},
        {"signal.kind": "chunk", "noise.unit": "token", "noise.timesteps": "uniform"},
    ],
    ids=["defaults", "no-comp-demo", "adaptive-k-small-batches", "tail-buckets", "chunk-signal"],
)
def test_rows_equal_those_of_a_naive_twin(tiny_root, tmp_path, changes):
    config = tiny_config(tiny_root, shards__samples_per_shard=3, **changes)
    rows = check_rows(config, tmp_path / "cache")
    assert sum(len(row.chunk_len) for row in rows) > 100
    if config.signal.kind == "topk":
        assert sum(len(row.target_position) for row in rows) > 30
        assert (np.concatenate([row.chunk_len for row in rows]) > 1).any()


def test_rows_of_a_shared_tokenizer_equal_those_of_a_naive_twin(tiny_root, tmp_path):
    """The teacher reads the student's ids: every response token, EOS filling included, is a chunk and a target."""
    rows = check_rows(tiny_config(tiny_root, shared=True, shards__samples_per_shard=4), tmp_path / "cache")
    for row in rows:
        masked = np.flatnonzero(row.masked) + row.prompt_tokens
        assert row.target_position.tolist() == row.chunk_start.tolist() == masked.tolist()


def test_a_cache_without_a_teacher_holds_the_same_samples_and_noise_law(tiny_root, tmp_path):
    config = tiny_config(tiny_root, teacher__path="")
    dump_teacher(config, tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    assert cache.manifest.teacher is None
    assert cache.manifest.signal.kind == "none"
    rows = list(cache)
    assert len(rows) == cache.manifest.totals.samples * config.noise.views
    assert {len(row.chunk_start) for row in rows} == {0}


def test_every_id_is_below_the_vocabulary_size_of_the_manifest(tiny_root, tmp_path):
    dump_teacher(tiny_config(tiny_root), tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    student = cache.manifest.student
    assert max(student.mask_id, student.eos_id) < student.vocab_size
    for row in cache:
        for ids in (row.x_0, row.top_ids):
            assert ids.size == 0 or 0 <= ids.min() <= ids.max() < student.vocab_size
        assert student.mask_id not in row.x_0


def test_nan_from_the_teacher_is_an_error_that_names_the_view(tiny_root, tmp_path, monkeypatch):
    """A model that overflows must not become a teacher that is certain, in no kind of signal."""

    def broken(self, *args, **kwargs):
        return torch.full_like(whole(self, *args, **kwargs), torch.nan)

    whole = Teacher._hidden
    monkeypatch.setattr(Teacher, "_hidden", broken)
    for kind in ("chunk", "topk"):
        with pytest.raises(DataError, match=r"sample [0-9a-f]{16}, view \d: the teacher's answer holds NaN.*float32"):
            dump_teacher(tiny_config(tiny_root, signal__kind=kind), tmp_path / kind)
        assert not list((tmp_path / kind / "data").glob("*"))


def test_progress_reports_every_token_forward(tiny_root, tmp_path):
    """Tokens per second on the screen are those that the teacher counts; far fewer than the naive 4 L per view."""
    reports: list[tuple[int, int]] = []
    config = tiny_config(tiny_root, shards__samples_per_shard=3, noise__views=8)
    dump_teacher(config, tmp_path / "cache", report=lambda *report: reports.append(report))
    plan = prepare_plan(config, tmp_path / "cache")
    task = open_task(tmp_path / "cache", plan)
    assert task.teacher is not None
    for shard in range(plan.num_shards):
        task.run(tmp_path / "cache", shard)
    assert sum(shards for shards, _ in reports) == plan.num_shards
    assert sum(tokens for _, tokens in reports) == task.teacher.num_token_forwards <= plan.expected_forwards
    lengths = [len(task.pairing.encode(task.conversations.read(*one[:3])).teacher.x_0) for one in plan.samples]
    assert task.teacher.num_token_forwards < 0.5 * 4 * sum(lengths) * config.noise.views


def test_batches_keep_to_the_budget_and_lose_nobody():
    rng = np.random.default_rng(0)
    for budget in (1, 50, 333):
        lengths = rng.integers(1, 100, 60).tolist()
        batches = list(by_tokens(lengths, budget))
        assert sorted(i for batch in batches for i in batch) == list(range(60))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    assert list(by_tokens([], 10)) == []
