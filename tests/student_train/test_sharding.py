"""What a launcher may ask for: the accelerate configurations that ship with tide, and others, refused by name."""

import os
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from tide.shared.config import TrainConfig
from tide.shared.errors import ConfigError
from tide.student_train.processes import join_processes
from tide.student_train.sharding import sharding_asked_for

RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"


def environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `accelerate launch --config_file FILE` gives to the processes that it starts, and they to `os.environ`."""
    arguments = ["--config_file", str(file), "--num_processes", "2", "-m", "tide"]
    options, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert options.num_processes == 2
    given = prepare_multi_gpu_env(options)
    for name, value in given.items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)
    return given


def test_every_shipped_configuration_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(path.name for path in RECIPES.iterdir()) == ["ddp.yaml", "fsdp2.yaml"]
    with monkeypatch.context() as patch:
        environment(RECIPES / "ddp.yaml", patch)
        assert sharding_asked_for() is None
    with monkeypatch.context() as patch:
        environment(RECIPES / "fsdp2.yaml", patch)
        plugin = sharding_asked_for()
        assert isinstance(plugin, FullyShardedDataParallelPlugin)
        assert plugin.reshard_after_forward is True


@pytest.mark.parametrize(
    "line, other",
    [
        ("fsdp_version: 2", "fsdp_version: 1"),
        ("fsdp_offload_params: false", "fsdp_offload_params: true"),
        ("fsdp_cpu_ram_efficient_loading: false", "fsdp_cpu_ram_efficient_loading: true"),
        ("fsdp_activation_checkpointing: false", "fsdp_activation_checkpointing: true"),
    ],
)
def test_sharding_that_tide_does_not_do_is_refused_by_name(
    tmp_path: Path, line: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (RECIPES / "fsdp2.yaml").read_text()
    if other == "fsdp_version: 1":
        text = text.replace("fsdp_reshard_after_forward: true", "fsdp_reshard_after_forward: FULL_SHARD")
    assert line in text
    (tmp_path / "other.yaml").write_text(text.replace(line, other))
    environment(tmp_path / "other.yaml", monkeypatch)
    with pytest.raises(ConfigError, match=other.partition(":")[0] + r" = .*recipes/accelerate/fsdp2\.yaml"):
        sharding_asked_for()


def test_deepspeed_is_refused_with_what_to_do_instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for asked in (sharding_asked_for, lambda: join_processes(TrainConfig(), tmp_path)):
        with pytest.raises(ConfigError, match=r"asks for DeepSpeed.*recipes/accelerate/fsdp2\.yaml"):
            asked()
