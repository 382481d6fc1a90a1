"""`--launcher slurm`: the script, what sbatch is told, and that the script really dumps, stops and requeues."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from dump_checks import file_hashes, require_sound_files
from tide import cli
from tide.shared.config import RunConfig
from tide.shared.errors import ConfigError
from tide.teacher_dump.dump import dump_teacher, prepare_plan
from tide.teacher_dump.launchers.slurm import array_script
from tiny_runs import settings, tiny_config

SMALL = {"shards__samples_per_shard": 1, "noise__views": 1}
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def tide(monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tide", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the PATH with an sbatch and an scontrol that write down what they are told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {
        "sbatch": f"cat > {folder}/script; echo '4242;cluster'",
        "scontrol": f'echo "$@" >> {folder}/scontrol.log',
    }
    for name, text in programs.items():
        (folder / name).write_text(f'#!/bin/bash\necho "$@" > {folder}/{name}.arguments\n{text}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def options(root: Path, out: Path, **more: object) -> list[str]:
    return [text for item in settings(root, **SMALL, **more) for text in ("--set", item)] + ["--out", str(out)]


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_dry_run_prints_a_script_that_bash_understands_and_needs_no_slurm(tide, tiny_root, tmp_path, monkeypatch):
    more = ["--sbatch", "--partition=gpu --time=4:00:00", "--sbatch", "-A 'my lab'", "--skip-bad", "--verify"]
    command = ["dump-teacher", "--launcher", "slurm", "--workers", 8, *options(tiny_root, tmp_path / "cache")]
    code, script, err = tide(*command, "--dry-run", *more)
    assert (code, err) == (0, "")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=True, capture_output=True).stderr == ""
    told = directives(script)
    for line in ("--array=0-7", "--requeue", "--signal=B:USR1@90", "--gpus=1", "--partition=gpu", "--time=4:00:00",
                 "-A 'my lab'"):  # fmt: skip
        assert line in told, told
    assert "--launcher env" in script
    assert "data.skip_bad=true" in script
    assert "--verify" in script
    assert not (tmp_path / "cache").exists()


def test_options_of_the_user_replace_ours(tiny_root, tmp_path):
    config = tiny_config(tiny_root, teacher__devices_per_replica=4, workers__grace_s=100.5)
    script = array_script([], config, num_workers=2, folder=tmp_path)
    assert "--gpus=4" in directives(script)
    assert "--signal=B:USR1@161" in directives(script)
    on_cpu = tiny_config(tiny_root, teacher__device="cpu")
    assert "gpus" not in array_script([], on_cpu, num_workers=2, folder=tmp_path)
    sbatch = ["--gpus-per-node=a100:2 --array=0-1%1", "--no-requeue", "-J other"]
    told = directives(array_script([], config, num_workers=2, folder=tmp_path, sbatch=sbatch))
    assert [line for line in told if "gpus" in line] == ["--gpus-per-node=a100:2"]
    assert [line for line in told if "array" in line] == ["--array=0-1%1"]
    assert [line for line in told if "requeue" in line] == ["--no-requeue"]
    assert [line for line in told if "job-name" in line or "-J" in line] == ["-J other"]


@pytest.mark.parametrize("text", ["gpu", "", "--time '4", "--partition=a\nrm -rf /"])
def test_what_is_no_option_of_sbatch_is_refused(tiny_root, tmp_path, text):
    with pytest.raises(ConfigError, match="--sbatch"):
        array_script([], tiny_config(tiny_root), num_workers=1, folder=tmp_path, sbatch=[text])


def test_values_cannot_leave_their_place_in_the_script(tiny_root, tmp_path):
    """A folder or setting with blanks, quotes and dollar signs stays one word of the command."""
    nasty = "a b'c\"$(touch hacked)`touch hacked`"
    script = array_script(["--set", f"data.source={nasty}"], tiny_config(tiny_root), num_workers=1, folder=tmp_path)
    script = script.replace(sys.executable, str(tmp_path / "echo"))
    (tmp_path / "echo").write_text('#!/bin/bash\nprintf "%s\\n" "$@" > words\n')
    (tmp_path / "echo").chmod(0o755)
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True)
    assert f"data.source={nasty}" in (tmp_path / "words").read_text().splitlines()
    assert not (tmp_path / "hacked").exists()


def test_submitting_hands_the_script_to_sbatch_and_says_the_job(tide, tiny_root, tmp_path, cluster):
    command = ["dump-teacher", "--launcher", "slurm", "--workers", 2, *options(tiny_root, tmp_path / "cache"), "--json"]
    code, out, _ = tide(*command)
    assert code == 0
    assert json.loads(out) == {
        "job": "4242", "workers": 2, "cache": str(tmp_path / "cache"), "look_with": f"tide status {tmp_path / 'cache'}"
    }  # fmt: skip
    assert (cluster / "sbatch.arguments").read_text().strip() == "--parsable"
    assert (cluster / "script").read_text() == tide(*command, "--dry-run")[1]


def test_no_sbatch_an_sbatch_that_refuses_and_options_without_slurm(tide, tiny_root, tmp_path, cluster, monkeypatch):
    command = ["dump-teacher", "--launcher", "slurm", *options(tiny_root, tmp_path / "cache")]
    (cluster / "sbatch").write_text("#!/bin/bash\necho 'invalid partition specified: gpu' >&2\nexit 1\n")
    code, out, err = tide(*command)
    assert (code, out) == (69, "")
    assert "invalid partition" in err
    assert "--sbatch" in err
    monkeypatch.setenv("PATH", "")
    code, out, err = tide(*command)
    assert (code, out) == (69, "")
    assert "sbatch is not on the PATH" in err
    assert "--dry-run" in err
    assert tide("dump-teacher", *options(tiny_root, tmp_path / "cache"), "--dry-run")[0] == 2


def test_another_plan_is_refused_before_anything_waits_in_a_queue(tide, tiny_root, tmp_path, cluster):
    prepare_plan(tiny_config(tiny_root, **SMALL), tmp_path / "cache")
    command = ["dump-teacher", "--launcher", "slurm", *options(tiny_root, tmp_path / "cache", noise__seed=7)]
    code, _, err = tide(*command)
    assert code == 65
    assert "noise.seed" in err
    assert not (cluster / "script").exists()


@pytest.fixture
def element(tiny_root: Path, tmp_path: Path, cluster: Path) -> Callable[..., subprocess.Popen]:
    """element(3): runs the script as element 3 of an array, as Slurm would."""

    def start(config: RunConfig, number: int, out: Path, program: str | None = None) -> subprocess.Popen:
        script = array_script(options(tiny_root, out), config, num_workers=2, folder=tmp_path)
        if program is not None:
            script = script.replace(f"{sys.executable} -m tide", f"{sys.executable} {program}")
        environment = os.environ | {
            "SLURM_JOB_ID": f"{100 + number}", "SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", "-c", script], env=environment, cwd=tmp_path, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def test_the_elements_of_the_array_make_the_cache_together(tiny_root, tmp_path, element):
    """Both begin at once and without a plan; no Slurm is needed to run the script."""
    config = tiny_config(tiny_root, **SMALL)
    elements = [element(config, number, tmp_path / "cache") for number in (0, 1)]
    said = [one.communicate(timeout=100)[1] for one in elements]
    assert [one.returncode for one in elements] == [0, 0], said
    dump_teacher(config, tmp_path / "expected")
    assert file_hashes(tmp_path / "cache") == file_hashes(tmp_path / "expected")


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGUSR1, True), pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow)]
)
def test_the_warning_before_the_end_of_time_stops_the_worker_and_requeues(
    tiny_root, tmp_path, element, cluster, number, requeued
):
    """To the shell alone, as --signal=B: does; the shard in hand is finished. After scancel nothing is requeued."""
    config = tiny_config(tiny_root, **SMALL)
    slow = tmp_path / "slow.py"  # the same program, with half a second in each shard
    slow.write_text(
        "import time\nfrom tide import cli\nfrom tide.teacher_dump.shard_task import ShardTask\nrun = ShardTask.run\n"
        "def slowly(*arguments):\n    time.sleep(0.5)\n    return run(*arguments)\nShardTask.run = slowly\ncli.main()\n"
    )
    one = element(config, 1, tmp_path / "cache", program=str(slow))
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache" / "receipts").glob("0*.json")):
        assert time.monotonic() < deadline
        assert one.poll() is None, one.communicate()[1]
        time.sleep(0.02)
    os.kill(one.pid, number)
    _, err = one.communicate(timeout=30)
    assert one.returncode == 75, err
    assert f"stopped by {number.name}" in err
    assert (cluster / "scontrol.log").exists() == requeued
    if requeued:
        assert (cluster / "scontrol.log").read_text() == "requeue 100_1\n"
    assert 1 <= require_sound_files(tmp_path / "cache") < 8
    dump_teacher(config, tmp_path / "cache")
    dump_teacher(config, tmp_path / "expected")
    assert file_hashes(tmp_path / "cache") == file_hashes(tmp_path / "expected")
