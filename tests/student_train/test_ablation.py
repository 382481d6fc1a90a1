"""`tide ablate` end to end on a tiny cache: what is planned, trained once, continued, compared and written."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tide import cli
from tide.shared.errors import CacheMismatch, ConfigError, TryAgain
from tide.student_train import arms
from tide.student_train.ablation import plan_ablation, run_ablation
from tide.student_train.arms import Job, run_job, run_jobs, worker_device
from tide.student_train.matrix import Arm, Claim, Matrix, read_matrix
from tide.student_train.trainer import Run
from tiny_runs import PAIRS, hybrid, make_cache, settings, write_pairs

CE, KL, DEMO = Arm(recipe="ce"), Arm(recipe="kl"), Arm(recipe="kl", cache={"noise.comp_demo": True})


@pytest.fixture(scope="module")
def caches(tiny_root: Path) -> SimpleNamespace:
    """with_demo and plain: the same samples; other: fewer; heldout: no teacher."""
    few = write_pairs(tiny_root / "few.jsonl", len(PAIRS) - 2)
    made = {
        "plain": hybrid(tiny_root, noise__comp_demo=False), "with_demo": hybrid(tiny_root, noise__comp_demo=True),
        "other": hybrid(tiny_root, data__source=few), "heldout": hybrid(tiny_root, teacher__path="", noise__views=1),
    }  # fmt: skip
    return SimpleNamespace(**{
        name: str(make_cache(tiny_root, f"ablation-{name}", config)) for name, config in made.items()
    })  # fmt: skip


def plan(matrix: Matrix, root: Path, caches: SimpleNamespace, *names: str, num_seeds: int = 1, **more: object) -> Any:
    given = [getattr(caches, name) for name in names or ["plain"]]
    return plan_ablation(matrix, hybrid(root, **more), given, caches.heldout, num_seeds=num_seeds)


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs run one after the other, here; the list holds what was trained."""
    trained: list[str] = []
    original = arms.train_student

    def train(config: Any, cache: str, out: Path) -> Path:
        trained.append(out.name.rpartition("-")[0])
        return original(config, cache, out)

    def finished(pool: Any, groups: list[list[Job]], stopped: Callable[[], bool]) -> Any:
        for same in groups:
            yield same, run_job(same[0], pool.out)

    monkeypatch.setattr(arms, "train_student", train)
    monkeypatch.setattr(arms._Pool, "finished", finished)
    return trained


def when(condition: Callable[[], object], action: Callable[[], None]) -> threading.Thread:
    """Does `action` once `condition` is true, from another thread, within two minutes."""

    def watch() -> None:
        end = time.monotonic() + 120
        while not condition() and time.monotonic() < end:
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def same_scores(one: Sequence[Any], other: Sequence[Any]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a["bits_per_byte"] == b["bits_per_byte"]
        assert a["documents"] == b["documents"]


def test_arms_take_the_cache_they_ask_for_and_others_are_left_out_with_what_to_dump(tiny_root, caches) -> None:
    matrix = Matrix("ce", {"ce": CE, "kl": KL, "demo": DEMO, "many": Arm(recipe="kl", train={"max_views": 9})})
    planned = plan(matrix, tiny_root, caches, "plain", "with_demo", num_seeds=2)
    assert planned.caches == {"ce": caches.plain, "kl": caches.plain, "demo": caches.with_demo}
    assert [(job.arm, job.seed) for job in planned.jobs] == [
        ("ce", 0), ("kl", 0), ("demo", 0), ("ce", 1), ("kl", 1), ("demo", 1)]  # fmt: skip
    assert "dump again with noise.views=9" in planned.left_out["many"]
    alone = plan(matrix, tiny_root, caches, "plain")
    assert "--set noise.comp_demo=true" in alone.left_out["demo"]
    assert caches.plain in alone.left_out["demo"]
    clean = Matrix("ce", {"ce": CE, "clean": Arm(recipe="ce", cache={"signal.kind": "none"})})
    assert "--teacher none (no teacher, clean samples only)" in plan(clean, tiny_root, caches).left_out["clean"]
    with pytest.raises(ConfigError, match="no arm of the matrix can be run"):
        plan(Matrix("demo", {"demo": DEMO}), tiny_root, caches)
    with pytest.raises(ConfigError, match=r"'noise.demo'; expected one of noise.comp_demo"):
        plan(Matrix("a", {"a": Arm(recipe="ce", cache={"noise.demo": 1})}), tiny_root, caches)


def test_caches_of_other_samples_or_for_another_student_are_refused(tiny_root, caches, tmp_path) -> None:
    matrix = Matrix("ce", {"ce": CE})
    with pytest.raises(CacheMismatch, match="6 samples.*8 of"):
        plan(matrix, tiny_root, caches, "plain", "other")
    with pytest.raises(CacheMismatch, match="tokenizer"):
        plan(matrix, tiny_root, caches, student__path=tiny_root / "teacher")


def test_the_whole_command_writes_table_picture_and_json_and_trains_nothing_twice(
    tiny_root, caches, tmp_path, monkeypatch, capsys
) -> None:
    trained = in_this_process(monkeypatch)
    file = tmp_path / "matrix.yaml"
    text = """
baseline: ce
arms:
  ce: {recipe: ce}
  kl: {recipe: kl}
  kl-again: {recipe: kl}
  demo: {recipe: kl, cache: {noise.comp_demo: true}}
  k1: {recipe: kl, train: {max_top_k: 1}}
claims:
  - {claim: "KL | helps", better: kl, than: ce}
  - {claim: the same, better: kl, than: kl-again}
  - {claim: CompDemo, better: demo, than: kl, at: [0.9]}
  - {claim: right answers, better: kl, than: ce, metric: accuracy}
"""
    file.write_text(text)
    common = [item for setting in settings(tiny_root, train__steps=3, train__lr=1e-2) for item in ("--set", setting)]

    def run(*more: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [
            "tide", "ablate", "--cache", caches.plain, "--heldout", caches.heldout, "--out", str(tmp_path / "out"),
            "--matrix", str(file), *common, *more,
        ])  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        done = capsys.readouterr()
        return done.out, done.err

    out, _ = run("--dry-run", "--seeds", "1")
    assert out.count("to train") == 4
    assert not trained
    out, err = run("--seeds", "1")
    assert trained == ["ce-0", "kl-0", "k1-0"]  # kl-again is kl
    assert "left out: demo needs a cache with noise.comp_demo=true" in err
    result = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert sorted(result["arms"]) == ["ce", "k1", "kl", "kl-again"]
    assert result["arms"]["kl"]["seeds"] == result["arms"]["kl-again"]["seeds"]
    verdicts = {claim["claim"]: claim["verdict"] for claim in result["claims"]}
    assert verdicts["KL | helps"] == "open: a standard error needs two seeds or more"
    assert verdicts["the same"] == "not asked: with these caches, kl and kl-again are the same run"
    assert verdicts["CompDemo"] == "not asked: demo was not run"
    assert (tmp_path / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    written = (tmp_path / "out" / "ablation.md").read_text()
    assert written.strip() in out
    assert "| KL &#124; helps |" in written
    assert "- left out&#58; demo needs a cache with" in written

    trained.clear()
    out, _ = run("--seeds", "2", "--json")
    assert trained == ["ce-1", "kl-1", "k1-1"]
    arm = json.loads(out)["arms"]["kl"]
    difference = np.array(arm["against"]["ce"]["gain_by_seed"])
    assert arm["standard_error"] > 0
    assert arm["against"]["ce"]["standard_error"] == pytest.approx(difference.std(ddof=1) / np.sqrt(2))
    trained.clear()
    file.write_text(text.replace("max_top_k: 1", "max_top_k: 2"))
    run("--seeds", "2")
    assert trained == ["k1-0", "k1-1"]
    assert run("--seeds", "2", "--dry-run")[0].count("finished") == 8
    assert not list((tmp_path / "out" / "runs").glob("*/checkpoints"))


@pytest.mark.slow
def test_processes_score_as_one_process_does_and_a_killed_one_leaves_the_others_alone(
    tiny_root, caches, tmp_path, monkeypatch
) -> None:
    matrix = Matrix("ce", {"ce": CE, "kl": KL}, claims=(Claim("c", "kl", "ce"),))
    planned = plan(matrix, tiny_root, caches, train__steps=40, train__save_every=2)
    processes = []
    original = arms._Pool._start
    monkeypatch.setattr(
        arms._Pool, "_start",
        lambda pool, same: (original(pool, same), processes.append((same[0].arm, list(pool._running.values())[-1])))[0],
    )  # fmt: skip
    ce = next(job for job in planned.jobs if job.arm == "ce").folder(tmp_path / "out")
    killer = when(
        lambda: list(ce.glob("checkpoints/step-*")),
        lambda: next(worker.process.kill() for arm, worker in processes if arm == "ce"),
    )
    said: list[str] = []
    result = run_ablation(matrix, planned, tmp_path / "out", workers=2, say=said.append)
    killer.join()
    assert list(result["arms"]) == ["kl"]
    assert "code -9" in result["failed"]["ce seed 0"]
    assert result["claims"][0]["verdict"] == "not asked: ce was not run"
    outcome = run_jobs(planned.jobs, tmp_path / "out", workers=2, say=said.append)
    assert [arm for arm, _ in processes] == ["ce", "kl", "ce"]
    assert not outcome.failed
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [run_job(job, tmp_path / "alone") for job in planned.jobs]
    torch.set_num_threads(threads)
    same_scores([outcome.scores[job.arm, job.seed] for job in planned.jobs], alone)


def test_a_stopped_command_saves_every_training_and_continues(tiny_root, caches, tmp_path) -> None:
    planned = plan(Matrix("ce", {"ce": CE, "kl": KL}), tiny_root, caches, train__steps=400, train__save_every=10_000)
    folders = [job.folder(tmp_path) for job in planned.jobs]
    stopper = when(
        lambda: all((folder / "metrics.jsonl").exists() for folder in folders),
        lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    with pytest.raises(TryAgain, match="the same command continues"):
        run_jobs(planned.jobs, tmp_path, workers=2, say=lambda line: None)
    stopper.join()
    for folder in folders:
        (checkpoint,) = (folder / "checkpoints").iterdir()
        assert 0 < int(checkpoint.name.split("-")[1]) < 400
        assert not (folder / "heldout.json").exists()


@pytest.mark.slow
def test_workers_of_a_killed_command_save_and_end(tiny_root, caches, tmp_path) -> None:
    program = f"""
if __name__ == "__main__":
    import sys
    from pathlib import Path
    sys.path.insert(0, {str(Path(__file__).parents[1])!r})
    from tiny_runs import hybrid
    from tide.student_train.arms import run_jobs
    from tide.student_train.ablation import plan_ablation
    from tide.student_train.matrix import Arm, Matrix
    base = hybrid(Path({str(tiny_root)!r}), train__steps=4000, train__save_every=10_000)
    jobs = plan_ablation(Matrix("kl", {{"kl": Arm(recipe="kl")}}), base, [{caches.plain!r}], {caches.heldout!r},
                         num_seeds=1).jobs
    run_jobs(jobs, Path({str(tmp_path)!r}), workers=1, say=print)
"""
    (tmp_path / "program.py").write_text(program)
    with subprocess.Popen([sys.executable, str(tmp_path / "program.py")], stdout=subprocess.PIPE) as process:
        killer = when(lambda: list(tmp_path.glob("runs/*/metrics.jsonl")), process.kill)
        assert process.stdout is not None
        process.stdout.read()  # until every process that could write to it has ended
        killer.join()
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("runs/*/checkpoints/step-*"))


def test_a_training_that_diverges_is_told_and_the_others_are_compared(tiny_root, caches, tmp_path, monkeypatch) -> None:
    original = Run.step

    def step(run: Run, number: int, *more: Any) -> None:
        original(run, number, *more)
        if run.config.losses[-1].name == "kl":
            run.window.add({"loss": torch.tensor(float("nan"))})

    monkeypatch.setattr(Run, "step", step)

    def finished(pool: Any, groups: list[list[Job]], stopped: Callable[[], bool]) -> Any:
        for same in groups:
            try:
                yield same, run_job(same[0], pool.out)
            except arms.TideError as error:
                yield same, error

    monkeypatch.setattr(arms._Pool, "finished", finished)
    matrix = Matrix("ce", {"ce": CE, "kl": KL})
    said: list[str] = []
    result = run_ablation(matrix, plan(matrix, tiny_root, caches), tmp_path, workers=1, say=said.append)
    assert "diverged" in result["failed"]["kl seed 0"]
    assert any("kl seed 0 failed" in line for line in said)
    assert list(result["arms"]) == ["ce"]


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [(None, 0, [None, None]), ("", 4, [None, None]), (None, 2, ["0", "1", "0"]), ("5,GPU-7", 8, ["5", "GPU-7", "5"])],
)
def test_workers_are_given_the_devices_in_turn(visible: str | None, count: int, expected: list) -> None:
    assert [worker_device(slot, visible, count) for slot in range(len(expected))] == expected


def test_the_shipped_matrices_run_on_a_cross_tokenizer_cache(tiny_root, caches) -> None:
    for name in ("paper", "cache"):
        planned = plan(read_matrix(name), tiny_root, caches, "plain", "with_demo")
        assert set(planned.left_out) <= {"kl-max_top_k-16"}
