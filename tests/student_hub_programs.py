"""Programs that push students to the loopback Hub and read them back; each prints one JSON object.

    python tests/student_hub_programs.py NAME FOLDER

See hub_programs.py; `read_plainly` runs without tide, as whoever pulls a student does.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from hub_programs import TOKEN, attempt
from loopback_hub import Fault, File, LoopbackHub

EVIL = "x | y\n---\nlicense: mit\n[a](http://evil) <img src=x> \x1b[31m**b** @all `c`"
PLAIN = """
import json, sys, warnings
import torch
card = open(sys.argv[1]).read()
exec(card.split("```python\\n")[1].split("```")[0])
with torch.no_grad():
    numbers = torch.arange(24).remainder(7).add(20)[None]
    block = torch.arange(24) // 8
    again = model(numbers, attention_mask=(block[:, None] >= block[None, :])[None, None]).logits
    causal = model(numbers).logits
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained("me/student")
    auto = "loaded"
except ValueError as error:
    auto = str(error)
print(json.dumps({"class": type(model).__name__, "card": logits.tolist(), "logits": again.tolist(), "auto": auto,
                  "causal": causal.tolist(), "tide": "tide" in sys.modules, "vocabulary": len(tokenizer)}))
"""


def trained(work: Path) -> tuple[Any, Path]:
    """The push of a cache, and the run folder of a student of two steps from it."""
    from tide.shared.cache.push import push_cache
    from tide.student_train.trainer import train_student
    from tiny_runs import hybrid, make_cache

    config = hybrid(work, train__steps=2)
    cache = make_cache(work, "cache", config)
    done = push_cache(cache, "me/cache", teacher_licence="mit", data_licence="cc-by-4.0")
    train_student(config, str(cache), work / "run", heldout=str(cache))
    return done, work / "run"


def push_student(hub: LoopbackHub, work: Path) -> dict[str, Any]:
    """Everything that may happen to the push of a student."""
    from tide.student_train.public_card import Cost
    from tide.student_train.push_student import Published, push_student

    cache, run = trained(work)
    stated = {"teacher_licence": "mit", "data_licence": "cc-by-4.0"}

    def pushed(name: str, *faults: Fault, path: Path = run, **more: Any) -> dict[str, Any]:
        hub.faults[:] = list(faults)
        hub.requests.clear()
        said: list[str] = []
        waited: list[float] = []
        options = {key: more.pop(key) for key in ("private", "tag") if key in more}
        published = Published(**{**stated, **more})
        result = attempt(lambda: push_student(path, name, published, say=said.append, sleep=waited.append, **options))
        hub.faults.clear()
        return {**result, "said": said, "waited": waited, "requests": list(hub.requests)}

    out: dict[str, Any] = {"cache": vars(cache), "work": str(work)}
    (run / "evaluation.json").write_text(json.dumps({"students": {"student": {
        "gsm8k": {"score": 41.25, "stderr": 1.5, "documents": 1319}}}}))  # fmt: skip
    (run / "student" / "secrets.json").write_text(f'{{"home": "{work}"}}')
    (run / "student" / "notes.txt").write_text(str(work))
    out["whole"] = pushed("me/student", private=True, cache=f"hf://datasets/me/cache@{cache.tag}",
                          cost=Cost(3.5, "one laptop", 0.25), start_licence="apache-2.0")  # fmt: skip
    repository = hub.repositories["me/student"]
    out["tree"] = {path: len(file.data) for path, file in repository.head.tree.items()}
    out["commits"] = [commit.paths for commit in repository.commits]
    out["private"], out["tags"] = repository.private, repository.tags
    out["card"] = repository.head.tree["README.md"].data.decode()
    out["config"] = json.loads(repository.head.tree["config.json"].data)
    out["leaks"] = [path for path, file in repository.head.tree.items() if str(work).encode() in file.data]
    out["again"] = pushed("me/student", cache=f"hf://datasets/me/cache@{cache.tag}", cost=Cost(3.5, "one laptop", 0.25),
                          start_licence="apache-2.0")  # fmt: skip
    out["other card"] = pushed("me/student", tag="v2")
    out["plain"] = read_plainly(work, repository.head.tree["README.md"].data)
    out["by tide"] = read_by_tide()
    out["here"] = read_by_tide(str(run / "student"))

    out["local cache"] = pushed("me/local")
    out["local card"] = hub.repositories["me/local"].head.tree["README.md"].data.decode()
    out["unknown licence"] = pushed("me/none", teacher_licence=None)
    out["other cache"] = pushed("me/none", cache=str(other_cache(work)))
    out["no login needed"] = "me/none" in hub.repositories
    out["not a student"] = pushed("me/none", path=work / "student")
    out["revision"] = pushed("hf://datasets/me/none")
    out["gpu hours"] = pushed("me/none", cost=Cost(-1.0))
    weights = run / "student" / "model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-9] + b"damaged!!")
    out["damaged"] = pushed("me/none")
    weights.write_bytes(sound)
    (run / "evaluation.json").write_text('{"scores": 3}')
    out["no scores"] = pushed("me/none")
    (run / "evaluation.json").write_text(json.dumps({"tasks": [{
        "name": EVIL, "metric": EVIL, "value": 0.5, "stderr": None, "n": 7}]}))  # fmt: skip
    out["hostile"] = pushed("me/hostile", cost=Cost(hardware="a | b <script>"), start_licence="x: y # z [1](b)")
    out["hostile card"] = hub.repositories["me/hostile"].head.tree["README.md"].data.decode()
    (run / "evaluation.json").unlink()

    hub.large.clear()
    out["interrupted"] = pushed("me/again", Fault("POST", "/commit/", status=403, message="no write access"))
    out["shown meanwhile"] = sorted(hub.repositories["me/again"].head.tree)
    out["continued"] = pushed("me/again")
    echo = f"Bearer {TOKEN} has been rejected"
    out["401"] = pushed("me/401", Fault("POST", "/create", status=401, message=echo))
    out["403"] = pushed("me/403", Fault("POST", "/create", status=403, message=echo))
    out["quota"] = pushed("me/quota", Fault("POST", "/commit/", status=403, message="storage limit reached"))
    out["429"] = pushed("me/429", Fault("POST", "/commit/", times=2, status=429, headers={"Retry-After": "7"}))
    out["500"] = pushed("me/500", Fault("GET", "me/500$", times=3, status=503))
    out["lost answer"] = pushed("me/lost", Fault("POST", "/commit/", times=1, cut_after=0))
    out["public"] = pushed("me/again", private=True)
    tree = dict(hub.repositories["me/again"].head.tree)
    hub.repositories["me/again"].commit("theirs", {**tree, "pytorch_model.bin": File(b"x", "0" * 64)}, [])
    out["stray"] = pushed("me/again")
    del os.environ["HF_TOKEN"]
    out["no login"] = pushed("me/anonymous")
    return out


def other_cache(work: Path) -> Path:
    """A cache that the student was not trained from."""
    from tiny_runs import hybrid, make_cache

    return make_cache(work, "other", hybrid(work, noise__seed=99))


def read_by_tide(path: str = "me/student") -> dict[str, Any]:
    """Logits through tide's own loader."""
    import torch
    from tide.shared.models.loading import load_model

    model = load_model(path)
    block = torch.arange(24) // 8
    ids = torch.arange(24).remainder(7).add(20)[None]
    with torch.no_grad():
        logits = model(ids, attention_mask=(block[:, None] >= block[None, :])[None, None]).logits
    return {"logits": logits.tolist(), "architectures": model.config.architectures, "type": model.config.model_type}


def read_plainly(work: Path, card: bytes) -> dict[str, Any]:
    """What the card's own lines give in a process that never heard of tide."""
    (work / "card.md").write_bytes(card)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(work / "card.md")], capture_output=True, text=True, check=False, cwd=work,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, re.sub(r"\s+", " ", done.stderr)[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "said": done.stderr}


PROGRAMS = {"push_student": push_student}

if __name__ == "__main__":
    program, folder = PROGRAMS[sys.argv[1]], Path(sys.argv[2])
    with LoopbackHub() as server:
        os.environ.update(server.environment(folder / "home", TOKEN))
        print(json.dumps(program(server, folder)))
