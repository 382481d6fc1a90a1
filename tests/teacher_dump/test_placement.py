"""Where a teacher's copies go: devices by rank, layers over devices, and clear words where something does not fit.

No accelerator is here: device lists are faked, and the hooks that move tensors between devices run with the CPU as
every device, which shows that they leave the answers alone.
"""

import json

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from official_models import spec_of, write_official
from tide.shared import devices
from tide.shared.config import TeacherConfig, load_config
from tide.shared.errors import ConfigError, Unavailable
from tide.shared.models import load_model
from tide.shared.models.size import empty_model
from tide.teacher_dump.placement import device_map, open_placed, replica_devices, require_room
from tide.teacher_dump.plan import make_plan
from tide.teacher_dump.teacher import Pass, Teacher
from tiny_runs import tiny_config

VOCAB, MASK = 320, 319
CUDA = [torch.device("cuda", i) for i in range(8)]


@pytest.fixture
def eight_gpus(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    for name in devices.LOCAL_RANKS:
        monkeypatch.delenv(name, raising=False)


def replica(num: int) -> list[torch.device]:
    return replica_devices(TeacherConfig(devices_per_replica=num))


@pytest.mark.parametrize("variable", devices.LOCAL_RANKS)
def test_every_rank_has_devices_of_its_own(eight_gpus, monkeypatch, variable):
    for rank in range(9):
        monkeypatch.setenv(variable, str(rank))
        assert replica(1) == [CUDA[rank % 8]]
        assert replica(2) == CUDA[rank % 4 * 2 :][:2]
        assert replica(3) == CUDA[rank % 2 * 3 :][:3]  # two devices stay idle
        assert replica(8) == CUDA


def test_without_a_rank_the_first_devices_are_used(eight_gpus):
    assert replica(2) == CUDA[:2]


def test_more_devices_than_there_are_is_an_error(eight_gpus, monkeypatch):
    with pytest.raises(ConfigError, match=r"devices_per_replica, .*: 9 devices are asked for, and this machine has 8"):
        replica(9)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert replica(1) == [torch.device("cpu")]
    with pytest.raises(ConfigError, match=r"devices_per_replica, teacher.device = 'auto': this machine has cpu"):
        replica(2)


@pytest.mark.parametrize(("name", "num"), [("llada2", 2), ("llada2", 3), ("wedlm-8b", 4), ("llada", 2)])
def test_layers_stay_whole_and_in_order_and_are_spread_evenly(name, num, tmp_path):
    config = json.loads((write_official(tmp_path, name, vocab_size=VOCAB) / "config.json").read_text())
    config.pop("layer_types", None)
    config |= {"num_hidden_layers": 12} if "num_hidden_layers" in config else {"n_layers": 12}
    model = empty_model(config, "m")
    layout = device_map(model, CUDA[:num])
    place, size = {}, dict.fromkeys(CUDA[:num], 0)
    for name, weight in model.named_parameters():
        (prefix,) = [key for key in layout if key == name or name.startswith(f"{key}.")]
        place[name] = layout[prefix]
        size[layout[prefix]] += weight.numel()
    layers = [{place[n] for n in place if n.startswith(f"model.layers.{i}.")} for i in range(12)]
    assert all(len(devices) == 1 for devices in layers)
    order = [place["model.embed_tokens.weight"].index, *(devices.pop().index for devices in layers)]
    assert order == sorted(order)
    assert set(place.values()) == set(CUDA[:num])
    largest = max(sum(w.numel() for w in layer.parameters()) for layer in model.model.layers)
    table = model.get_input_embeddings().weight.numel()
    assert max(size.values()) - min(size.values()) <= num * (largest + table)


def test_more_parts_than_layers_is_an_error(tmp_path):
    config = json.loads((write_official(tmp_path, "wedlm-8b", vocab_size=VOCAB) / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"devices_per_replica = 64: the 2 layers of the teacher cannot be cut"):
        device_map(empty_model(config, "m"), [torch.device("cuda", i) for i in range(64)])


def test_too_little_memory_says_what_would_help():
    require_room(30 << 30, CUDA[:2], [16 << 30, 16 << 30], "m")
    with pytest.raises(Unavailable, match=r"m: the weights need 30\.0 GiB, and cuda:0 have 22\.0 GiB free") as said:
        require_room(30 << 30, CUDA[:1], [22 << 30], "m")
    assert "devices_per_replica to 2 or more" in str(said.value)
    assert "quantization to nf4" in str(said.value)


def ask(model, folder) -> list[torch.Tensor]:
    spec = spec_of(folder, "native", mask_id=MASK, eos_id=MASK - 1)
    teacher, rng = Teacher(model, spec), np.random.default_rng(0)
    x_0 = [rng.integers(0, MASK, length).astype(np.int32) for length in (40, 24)]
    masks = [np.append(False, rng.random(len(ids) - 1) < 0.4) for ids in x_0]
    context = teacher.prefill(x_0, [teacher.last_block(masked) for masked in masks])
    answers = teacher.score(context, [Pass(i, m, m, m) for i, m in enumerate(masks)], k=4, temperatures=(1.0, 2.0))
    return [answers.gold_logp, answers.targets.top_logp, answers.targets.log_z]


@pytest.mark.parametrize("name", ["llada2", "wedlm-8b", "dream", "llada"])
def test_a_spread_teacher_gives_the_same_answers(name, tmp_path):
    folder = write_official(tmp_path, name, vocab_size=VOCAB)
    expected = ask(load_model(folder), folder)
    config = json.loads((folder / "config.json").read_text())
    layout = dict.fromkeys(device_map(empty_model(config, "m"), CUDA[:2]), "cpu")
    model = load_model(folder)
    spread = dispatch_model(
        model, layout, main_device="cpu", skip_keys=model._skip_keys_device_placement, force_hooks=True
    )
    assert hasattr(spread.model.layers[0], "_hf_hook")
    for found, wanted in zip(ask(spread, folder), expected, strict=True):
        assert torch.equal(found, wanted)


def test_on_a_cpu_the_teacher_is_opened_as_it_is(tmp_path):
    folder = write_official(tmp_path, "llada2", vocab_size=VOCAB)
    teacher = load_config(overrides=["teacher.dtype=float32"]).teacher
    for found, wanted in zip(ask(open_placed(teacher, folder), folder), ask(load_model(folder), folder), strict=True):
        assert torch.equal(found, wanted)


def test_how_a_teacher_is_spread_is_no_part_of_the_plan(tiny_root):
    one, _ = make_plan(tiny_config(tiny_root))
    two, _ = make_plan(tiny_config(tiny_root, teacher__devices_per_replica=2))
    assert one.hash == two.hash


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_router_computes_in_float32_when_the_rest_does_not(dtype, tmp_path):
    """Weights that are no bfloat16 numbers: a rounded router would choose and weigh experts differently."""
    folder = write_official(tmp_path, "llada2", vocab_size=VOCAB)
    exact = load_model(folder).model.layers[1].mlp.gate
    router = load_model(folder, dtype=dtype).model.layers[1].mlp.gate
    assert torch.equal(router.weight, exact.weight)
    assert torch.equal(router.e_score_correction_bias, exact.e_score_correction_bias)
    hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    for found, wanted in zip(router(hidden), exact(hidden), strict=True):
        assert torch.equal(found, wanted)
