"""`kill -9` while a checkpoint is written: whatever the moment, a whole one that is no older than before is found.

Children are forked from one process that has torch loaded, so that many moments cost little.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

PROGRAM = """
import json, os, random, shutil, signal, sys, time, traceback, warnings
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from tide.shared.config import TrainConfig
from tide.shared.models.loading import load_model
from tide.student_train.checkpoint import find_checkpoint, save_checkpoint
from tide.student_train.engines import build_optimizers

warnings.simplefilter("error")  # a damaged checkpoint is a warning
draw = random.Random(0)


def kill_at_random_moments(root, work, identity, kills, spread_s):
    # Returns how many kills hit a save, and the steps found after each kill.
    in_the_middle, steps = 0, []
    for _ in range(kills):
        child = os.fork()
        if not child:
            try:
                work()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        until, ended = time.monotonic() + 60, (0, 0)
        while not list(root.glob(".step-*")) and not ended[0]:
            assert time.monotonic() < until, "no checkpoint is written"
            time.sleep(0.0005)
            ended = os.waitpid(child, os.WNOHANG)
        time.sleep(draw.random() ** 2 * spread_s)  # soon, mostly, but late enough at times for a save to end
        if not ended[0]:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
        if os.WIFEXITED(ended[1]):
            assert os.WEXITSTATUS(ended[1]) == 0, "the work failed"
            break  # it is done
        in_the_middle += bool(list(root.glob(".step-*")))
        found = find_checkpoint(root, identity())
        steps.append(found.step if found else None)
        for half_written in root.glob(".step-*.tmp"):  # so that the next save is seen to begin
            shutil.rmtree(half_written)
    return in_the_middle, steps

{body}
print(json.dumps(result))
"""

SAVES = """
model = load_model({student!r})
optimizers = build_optimizers(model, TrainConfig(optimizer="muon"))
for p in model.parameters():
    p.grad = torch.randn_like(p)
for optimizer in optimizers.values():
    optimizer.step()
root = Path({out!r})
save = lambda step: save_checkpoint(
    root, step, model, optimizers, identity=dict(a=1), window=dict(), keep={keep}
)


def save_on():
    found = find_checkpoint(root, dict(a=1))
    step = found.step if found else 0
    while True:
        step += 1
        save(step)
        save(step)  # the second time, a whole folder of that name is there


start = time.monotonic()
save(1)
result = kill_at_random_moments(root, save_on, lambda: dict(a=1), {kills}, 3 * (time.monotonic() - start))
"""

TRAINING = """
from tide.shared.cache import open_cache
from tide.student_train.trainer import run_identity, train_student
from tiny_runs import hybrid

config = hybrid(Path({root!r}), train__steps=60, train__save_every=1)
identity = run_identity(config, open_cache({cache!r}))
train = lambda: train_student(config, {cache!r}, Path({out!r}))
result = kill_at_random_moments(Path({out!r}) / "checkpoints", train, lambda: identity, 40, 0.6)
train()
"""


def run_program(body: str, **values: object) -> tuple[int, list[int | None]]:
    filled = body.format(**{name: value if isinstance(value, int) else str(value) for name, value in values.items()})
    program = PROGRAM.format(tests=str(Path(__file__).parents[1]), body=filled)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "keep, kills", [(1, 16), pytest.param(1, 100, marks=pytest.mark.slow), pytest.param(2, 60, marks=pytest.mark.slow)]
)
@pytest.mark.timeout(900)
def test_a_kill_during_a_save_leaves_a_whole_checkpoint_no_older_than_before(
    tiny: SimpleNamespace, tmp_path: Path, keep: int, kills: int
) -> None:
    in_the_middle, steps = run_program(
        SAVES, student=tiny.root / "student", out=tmp_path / "checkpoints", keep=keep, kills=kills
    )
    assert len(steps) == kills
    assert in_the_middle >= kills // 4
    assert None not in steps
    assert steps == sorted(steps)
    assert steps[-1] > 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_killed_in_its_saves_ends_as_an_undisturbed_one(tiny: SimpleNamespace, tmp_path: Path) -> None:
    in_the_middle, steps = run_program(TRAINING, root=tiny.root, cache=tiny.cache, out=tiny.out)
    known = [step for step in steps if step is not None]
    assert in_the_middle >= 5, steps
    assert steps[-len(known) :] == known == sorted(known)
    tiny.train(tiny.config(train__steps=60, train__save_every=1), tmp_path / "whole")
    tiny.assert_same_run(tiny.out, tmp_path / "whole")
