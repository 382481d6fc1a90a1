"""What a launcher may ask for: the accelerate configurations that ship with tide, and others, refused by name."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from tide.shared.config import TrainConfig
from tide.shared.errors import ConfigError, Unavailable
from tide.student_train.deepspeed_engine import Zero
from tide.student_train.engines import sharding_asked_for

RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"


def environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `accelerate launch --config_file FILE` gives to the processes that it starts, and they to `os.environ`."""
    arguments = ["--config_file", str(file), "--num_processes", "2", "-m", "tide"]
    options, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert options.num_processes == 2
    if options.use_deepspeed:
        options.deepspeed_fields_from_accelerate_config = ""  # accelerate's own plugin reads it, and tide does not
        _, given = prepare_deepspeed_cmd_env(options)
    else:
        given = prepare_multi_gpu_env(options)
    for name, value in given.items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)
    return given


def test_every_shipped_configuration_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(path.name for path in RECIPES.iterdir()) == ["ddp.yaml", "deepspeed.yaml", "fsdp2.yaml"]
    with monkeypatch.context() as patch:
        environment(RECIPES / "ddp.yaml", patch)
        assert sharding_asked_for(TrainConfig()) is None
    with monkeypatch.context() as patch:
        environment(RECIPES / "fsdp2.yaml", patch)
        plugin = sharding_asked_for(TrainConfig())
        assert isinstance(plugin, FullyShardedDataParallelPlugin)
        assert plugin.reshard_after_forward is True
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: name)
        environment(RECIPES / "deepspeed.yaml", patch)
        assert sharding_asked_for(TrainConfig()) == Zero(stage=2)


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
        sharding_asked_for(TrainConfig())


@pytest.mark.parametrize(
    "line, other, message",
    [
        ("zero_stage: 2", "zero_stage: 3", r"zero_stage = 3 .*recipes/accelerate/fsdp2\.yaml"),
        ("zero_stage: 2", "zero_stage: 0", r"zero_stage = 0 .*recipes/accelerate/ddp\.yaml"),
        ("optimizer_device: none", "optimizer_device: cpu", "offload_optimizer_device = cpu .*FSDP2"),
        ("param_device: none", "param_device: nvme", "offload_param_device = nvme .*FSDP2"),
        ("zero_stage: 2", "gradient_clipping: 0.5", r"gradient_clipping = 0\.5 .*set train\.grad_clip"),
        ("zero_stage: 2", "gradient_accumulation_steps: 4", "gradient_accumulation_steps = 4 .*train.micro_batch_size"),
    ],
)
def test_what_tide_does_not_do_under_deepspeed_is_refused_by_name(
    tmp_path: Path, line: str, other: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (RECIPES / "deepspeed.yaml").read_text()
    assert line in text
    (tmp_path / "other.yaml").write_text(text.replace(line, other))
    environment(tmp_path / "other.yaml", monkeypatch)
    with pytest.raises(ConfigError, match=message):
        sharding_asked_for(TrainConfig())


def asked_by_file(tmp_path: Path, tree: object, monkeypatch: pytest.MonkeyPatch) -> object:
    """What tide reads of a DeepSpeed configuration that the launcher names."""
    (tmp_path / "zero.json").write_text(json.dumps(tree))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return sharding_asked_for(TrainConfig())


def test_of_a_deepspeed_file_stage_and_communication_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000, "overlap_comm": "auto"},
        "train_batch_size": "auto", "gradient_clipping": "auto",
        "fp16": {"enabled": False}, "bf16": {"enabled": "auto"},
    }  # fmt: skip
    assert asked_by_file(tmp_path, tree, monkeypatch) == Zero(stage=1, communication={"reduce_bucket_size": 1000})


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"fp16": {"enabled": True}}, r"fp16 in .*zero\.json: .*train\.precision"),
        ({"bf16": {"enabled": True}}, r"bf16 in .*zero\.json: .*train\.precision"),
        ({"bf16": True}, r"bf16 in .*zero\.json: .*train\.precision"),
        ({"train_batch_size": 8}, r"train_batch_size in .*tide's own settings"),
        ({"optimizer": {"type": "Adam"}}, r"optimizer in .*tide's own settings"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, r"zero_optimization\.offload_optimizer in "),
        ({"zero_optimization": {"stage": 3}}, r"zero_stage = 3 "),
        ({"zero_optimization": {"stage": "two"}}, r"zero_stage = two "),
        ([], r"deepspeed_config_file = .*zero\.json: no DeepSpeed configuration in JSON"),
    ],
)
def test_a_deepspeed_file_that_says_more_is_refused_by_name(
    tmp_path: Path, tree: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=message):
        asked_by_file(tmp_path, tree, monkeypatch)


def test_muon_under_deepspeed_is_refused_with_what_to_do_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"train\.optimizer=muon under DeepSpeed.*recipes/accelerate/fsdp2\.yaml"):
        sharding_asked_for(TrainConfig(optimizer="muon"))


def test_without_the_package_deepspeed_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"pip install 'tide-distill\[deepspeed\]'"):
        sharding_asked_for(TrainConfig())


def test_nothing_imports_deepspeed_before_it_is_to_drive() -> None:
    program = (
        "import sys, pathlib, tide.cli, tide.student_train.trainer as trainer\n"
        "from tide.shared.config import TrainConfig\n"
        "for asked in ('false', 'true'):\n"
        "    trainer.os.environ['ACCELERATE_USE_DEEPSPEED'] = asked\n"
        "    trainer.join_processes(TrainConfig(), pathlib.Path('unused'))\n"
        "assert 'deepspeed' not in sys.modules\n"
    )
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("the extra `deepspeed` is not installed")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
