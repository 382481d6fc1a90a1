"""Training from a cache in an object store is training from its folder."""

import fsspec
import pytest
from tide.student_train.trainer import train_student
from tiny_runs import hybrid, make_cache, metrics


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # aiohttp's sockets, until the process ends
def test_a_student_trained_from_a_bucket_is_the_one_trained_from_the_folder(tiny_root, tmp_path, bucket, s3):
    config = hybrid(tiny_root, shard_cache__folder=str(tmp_path / "shards"))
    root = make_cache(tiny_root, "hybrid-cache", config)
    fs, base = fsspec.core.url_to_fs(f"{bucket}/cache", skip_instance_cache=True)
    fs.put(f"{root}/", f"{base}/", recursive=True)
    s3.requests.clear()
    local = train_student(config, str(root), tmp_path / "local")
    assert not s3.requests
    remote = train_student(config, f"{bucket}/cache", tmp_path / "remote")
    ours, theirs = ([
        {name: value for name, value in line.items() if name != "tokens_per_s"} for line in metrics(tmp_path / run)
    ] for run in ("remote", "local"))  # fmt: skip
    assert ours == theirs
    assert len(ours) >= 2
    assert (remote / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()
    fetched = s3.asked("^GET .*/(data|vocabulary)")
    assert len(fetched) == len(set(fetched)) == len(list((root / "data").iterdir())) + 1
