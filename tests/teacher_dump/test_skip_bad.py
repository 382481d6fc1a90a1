"""A sample that the teacher answers with NaN, or that cannot be tokenised: named, and passed over only if permitted."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dump_checks import file_hashes
from tide.shared.cache import open_cache, read_manifest, shard_is_done, verify_cache
from tide.shared.config import RunConfig
from tide.shared.errors import DataError
from tide.teacher_dump import worker
from tide.teacher_dump.dump import dump_teacher, prepare_plan
from tide.teacher_dump.launchers import local
from tide.teacher_dump.pairing import Pairing
from tide.teacher_dump.plan import open_samples, read_plan
from tide.teacher_dump.shard_task import UNANSWERED, UNUSABLE, ShardTask
from tiny_runs import tiny_config

open_placed, encode = worker.open_placed, Pairing.encode
POISONED = 6  # number of a sample that holds a token of its own


@pytest.fixture
def config(tiny_root: Path) -> RunConfig:
    """Three samples a shard; several of them share a micro-batch."""
    return tiny_config(tiny_root, shards__samples_per_shard=3, noise__views=2)


@pytest.fixture
def permissive(tiny_root: Path) -> RunConfig:
    return tiny_config(tiny_root, shards__samples_per_shard=3, noise__views=2, data__skip_bad=True)


@pytest.fixture
def poisoned_id(config, tmp_path) -> str:
    return prepare_plan(config, tmp_path / "planned").samples[POISONED].sample_id


@pytest.fixture
def poison(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Afterwards the teacher's embedding of a token that one sample alone holds is NaN, and flows through the model."""
    plan = prepare_plan(config, tmp_path / "planned")
    conversations, pairing = open_samples(plan)
    said = [set(pairing.encode(conversations.read(*one[:3])).teacher.x_0.tolist()) for one in plan.samples]
    own = said[POISONED] - set().union(*(ids for i, ids in enumerate(said) if i != POISONED)) - {0}  # 0 pads
    assert own

    def apply() -> None:
        def opened(teacher, folder):
            model = open_placed(teacher, folder)

            def spoil(module, arguments, output):
                bad = torch.isin(arguments[0], torch.tensor(sorted(own)))
                return output.masked_fill(bad[..., None], float("nan"))

            model.get_input_embeddings().register_forward_hook(spoil)
            return model

        monkeypatch.setattr(worker, "open_placed", opened)

    return apply


def rows(root: Path) -> dict[tuple[str, int], object]:
    return {(row.sample_id, row.view): row for row in open_cache(root)}


def test_a_poison_sample_is_named_and_the_dump_goes_on_only_if_permitted(
    config, permissive, tmp_path, poison, poisoned_id
):
    """Finished shards stay, and the permission is not another plan: the same cache goes on."""
    dump_teacher(config, tmp_path / "sound")
    poison()
    with pytest.raises(DataError, match=f"sample {poisoned_id}, view 0.*NaN.*--skip-bad") as caught:
        dump_teacher(config, tmp_path / "cache")
    assert caught.value.exit_code == 65
    plan = read_plan(tmp_path / "cache")
    assert [shard_is_done(tmp_path / "cache", s, plan.hash) is not None for s in range(3)] == [True, True, False]
    before = (tmp_path / "cache" / "data" / "views-00000-of-00003.parquet").stat().st_mtime_ns
    with pytest.warns(UserWarning, match=f"sample {poisoned_id} is left out: teacher's answer is not a number"):
        manifest = dump_teacher(permissive, tmp_path / "cache")
    assert (tmp_path / "cache" / "data" / "views-00000-of-00003.parquet").stat().st_mtime_ns == before
    assert manifest.plan_hash == plan.hash
    assert manifest.dropped == {UNANSWERED: 1}
    assert manifest.totals.samples == len(plan.samples) - 1
    verify_cache(tmp_path / "cache")
    sound, left = rows(tmp_path / "sound"), rows(tmp_path / "cache")
    assert set(sound) - set(left) == {(poisoned_id, 0), (poisoned_id, 1)}
    for key, row in left.items():  # the neighbours in its micro-batch are what they would have been
        for name, value in vars(row).items():
            np.testing.assert_array_equal(value, getattr(sound[key], name), err_msg=name)


def test_any_worker_leaves_out_the_same_and_writes_the_same_bytes(permissive, tmp_path, poison, monkeypatch):
    poison()
    monkeypatch.setattr(local, "START_METHOD", "fork")
    with pytest.warns(UserWarning, match="is left out"):
        dump_teacher(permissive, tmp_path / "one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs go to their own stderr
        dump_teacher(permissive, tmp_path / "two", num_workers=2)
    assert file_hashes(tmp_path / "one") == file_hashes(tmp_path / "two")


def test_a_sample_that_cannot_be_tokenised_any_more(config, permissive, tmp_path, monkeypatch, poisoned_id):
    prepare_plan(config, tmp_path / "cache")

    def broken(self, conversation):
        if conversation.sample_id == poisoned_id:
            raise RuntimeError("a tokenizer panicked")
        return encode(self, conversation)

    monkeypatch.setattr(Pairing, "encode", broken)
    with pytest.raises(DataError, match=f"sample {poisoned_id} was planned.*a tokenizer panicked.*--skip-bad"):
        dump_teacher(config, tmp_path / "cache")
    with pytest.warns(UserWarning, match="is left out: cannot be tokenised"):
        manifest = dump_teacher(permissive, tmp_path / "cache")
    assert manifest.dropped == {UNUSABLE: 1}
    verify_cache(tmp_path / "cache")


def test_a_shard_of_which_nothing_is_left_is_an_empty_file_that_verifies_and_trains(
    tiny_root, tmp_path, monkeypatch, poisoned_id
):
    config = tiny_config(tiny_root, shards__samples_per_shard=1, noise__views=2, data__skip_bad=True)
    plan = prepare_plan(config, tmp_path / "cache")

    def broken(self, conversation):
        if conversation.sample_id == poisoned_id:
            raise ValueError("no")
        return encode(self, conversation)

    monkeypatch.setattr(Pairing, "encode", broken)
    with pytest.warns(UserWarning, match="is left out"):
        manifest = dump_teacher(config, tmp_path / "cache")
    assert [shard.rows for shard in manifest.shards].count(0) == 1
    assert verify_cache(tmp_path / "cache").rows == 2 * (plan.num_shards - 1)
    cache = open_cache(tmp_path / "cache")
    assert len(list(cache)) == len(cache) == 2 * (plan.num_shards - 1)
    assert {row.sample_id for row in cache} == {s.sample_id for s in plan.samples} - {poisoned_id}


def test_a_teacher_that_answers_nothing_is_found_out_after_three_shards(tiny_root, tmp_path, monkeypatch):
    """--skip-bad must not turn days of a broken teacher into an empty cache."""
    config = tiny_config(tiny_root, shards__samples_per_shard=1, noise__views=1, data__skip_bad=True)

    def opened(teacher, folder):
        model = open_placed(teacher, folder)
        model.get_input_embeddings().register_forward_hook(lambda module, arguments, output: output * float("nan"))
        return model

    monkeypatch.setattr(worker, "open_placed", opened)
    shards: list[int] = []
    run = ShardTask.run
    monkeypatch.setattr(ShardTask, "run", lambda *a: (shards.append(a[2]), run(*a))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="shards 1, 2, 3: not one sample.*weights are damaged"):
            dump_teacher(config, tmp_path / "cache")
    assert shards == [0, 1, 2, 3]  # the view of sample 0 masks nothing, so nothing was asked
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_the_manifest_counts_what_was_left_out_by_reason(tmp_path, permissive, poison, config):
    """Once at planning (none here), once at dumping; receipts say it by shard."""
    poison()
    with pytest.warns(UserWarning, match="is left out"):
        dump_teacher(permissive, tmp_path / "cache")
    plan = read_plan(tmp_path / "cache")
    receipts = [shard_is_done(tmp_path / "cache", shard, plan.hash) for shard in range(plan.num_shards)]
    assert [receipt.left_out for receipt in receipts if receipt] == [{}, {}, {UNANSWERED: 1}]
    assert read_manifest(tmp_path / "cache").dropped == {UNANSWERED: 1}


@pytest.mark.parametrize("per_shard", [4, 8])
def test_a_dump_that_leaves_nothing_is_an_error_and_goes_on_once_it_is_mended(
    tiny_root, tmp_path, monkeypatch, per_shard
):
    config = tiny_config(tiny_root, shards__samples_per_shard=per_shard, noise__views=1, data__skip_bad=True)
    dump_teacher(config, tmp_path / "expected")

    def broken(self, conversation):
        raise ValueError("no")

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(Pairing, "encode", broken)

        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "plan.json").write_bytes((tmp_path / "expected" / "plan.json").read_bytes())
        with pytest.raises(
            DataError, match=r"every one of the 8 planned samples was left out \(cannot be tokenised: 8\)"
        ):
            dump_teacher(config, tmp_path / "cache")
    assert not (tmp_path / "cache" / "manifest.json").exists()
    dump_teacher(config, tmp_path / "cache")
    assert file_hashes(tmp_path / "cache") == file_hashes(tmp_path / "expected")
