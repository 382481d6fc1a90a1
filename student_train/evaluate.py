"""`tide eval`: students x benchmarks -> one result file each, resumed where it stopped, and the report over them.

    out/student/TASK-HASH.json           score, standard error, what was asked and how, the score of every document
    out/student/TASK-HASH.samples.jsonl  what the student wrote, document by document
    out/compare/...                      the same for the student of --compare
    out/evaluation.json|md|png           both beside the paper (evaluation_report.py), of the last run

The hash is of all settings: a result that is there is not made again, and no run replaces another's. Inside a task,
answers are kept in lm-eval's response cache while it runs. Under accelerate or torchrun, documents are shared out; the
first process writes.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import gather_object

from ..shared.addresses import require_apart
from ..shared.cache.files import atomic_write, readable_json, sha256_bytes
from ..shared.config import RunConfig, StudentConfig, to_tree
from ..shared.errors import ConfigError, DataError, TideError
from .code_sandbox import CodeEval, protection
from .evaluation_report import standard_error, write_report
from .lm_eval_tasks import load_tasks, require_lm_eval
from .processes import on_every_process, on_main
from .sampling import answer_settings
from .tide8 import SUITE, Benchmark, chosen_benchmarks

if TYPE_CHECKING:
    from .lm_eval_model import OpenStudent, TideLM

Say = Callable[[str], object]
_FOLDERS = ("student", "compare")
_PROGRESS_S = 30.0


@dataclass(frozen=True)
class EvaluationRun:
    """What `tide eval` was asked.

    Args:
        config: the student, `decoding` and `evaluation`.
        compare: a second student to set beside it; usually one trained by cross-entropy alone.
        overrides: names of settings of `decoding` that come before the protocol's.
        tasks: benchmarks by name; empty: the suite.
        limit: documents per task, and per subject of MMLU and its like; None: all.
        allow_code: run what students write, shut in. unsafe_code: and not shut in, in a container.
        data: folder with data sets; None: the current one, or the Hub.
    """

    config: RunConfig
    compare: str | None = None
    overrides: frozenset[str] = frozenset()
    suite: str = SUITE
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    batch_size: int = 16
    allow_code: bool = False
    unsafe_code: bool = False
    data: Path | None = None


def evaluate_students(run: EvaluationRun, out: Path, *, say: Say) -> dict[str, Any]:
    """Run what is missing, then write the report.

    Returns: the content of evaluation.json.
    Raises: ConfigError: an unknown task, a task that runs code without leave, `out` lies in what is read.
        Unavailable: lm-eval is missing, or code cannot be shut in. Any TideError that a task met, once the others are
        done and the report is written.
    """
    student = run.config.student
    read = {"student.path": student.path, "student.tokenizer": student.tokenizer}
    require_apart(out, {**read, "--compare": run.compare, "--data": run.data})
    benchmarks, left_out = chosen_benchmarks(run.suite, run.tasks, allow_code=run.allow_code)
    require_lm_eval()
    run = replace(run, data=run.data.resolve() if run.data else None)
    out = out.resolve()
    shut_in = protection(unsafe=run.unsafe_code) if any(b.runs_code for b in benchmarks) else None
    if shut_in and run.unsafe_code and PartialState().is_main_process:
        say(f"what the student writes is run, and shut in by {shut_in}")
    students = [run.config.student]
    if run.compare is not None:
        students.append(replace(run.config.student, path=run.compare, revision=None))
    # both are opened before either is asked: hours later is no time to learn of a wrong path
    arms = [_Arm(run, out / name, student, shut_in, say) for name, student in zip(_FOLDERS, students, strict=False)]
    results: dict[str, dict[str, Any]] = {arm.folder.name: {} for arm in arms}
    failed: dict[str, TideError] = {}
    for arm, benchmark in itertools.product(arms, benchmarks):
        try:
            results[arm.folder.name][benchmark.name] = arm.result(benchmark)
        except TideError as error:
            if arm.num_processes > 1 and error is not arm.met_by_all:  # the others may be waiting for this one
                raise
            failed[f"{arm.folder.name}/{benchmark.name}"] = error
            say(f"{arm.folder.name} {benchmark.name}: {error}")
    facts = {
        "suite": run.suite, "limit": run.limit, "left_out": left_out, "code_execution": shut_in,
        "failed": {name: str(error) for name, error in failed.items()},
    }  # fmt: skip
    report = write_report(out, facts, benchmarks, results) if arms[0].main else {}
    if failed:
        name, error = next(iter(failed.items()))
        raise type(error)(
            f"{len(failed)} of {len(arms) * len(benchmarks)} results could not be made, {name} because: {error} -- "
            f"the others are in {out}, and the same command continues"
        )
    return report


class _Arm:
    """One student's results in one folder."""

    def __init__(self, run: EvaluationRun, folder: Path, student: StudentConfig, shut_in: str | None, say: Say) -> None:
        from .lm_eval_model import open_student

        self.run, self.folder, self.shut_in = run, folder, shut_in
        self.config = replace(run.config, student=student)
        self.student: OpenStudent = open_student(self.config)
        self.state = PartialState()
        self.main, self.num_processes = self.state.is_main_process, self.state.num_processes
        self.say = say if self.main else lambda line: None
        self.met_by_all: TideError | None = None
        if run.limit is not None and run.limit < self.num_processes:
            raise ConfigError(
                f"--limit {run.limit} with {self.num_processes} processes: each must have a document of every task"
            )

    def result(self, benchmark: Benchmark) -> dict[str, Any]:
        """From its file, or made now."""
        lm = self._model(benchmark)
        settings = {  # everything that may change the score
            "task": benchmark.task, "metric": benchmark.metric, "shots": benchmark.shots, "limit": self.run.limit,
            "student": self.student.fingerprint, "decoding": answer_settings(lm.decoding),
            "evaluation": to_tree(lm.evaluation), "settings_digest": lm.settings_digest,
            "lm_eval": importlib.metadata.version("lm_eval"), "data": _data_digest(self.run.data),
            "batch_size": None if lm.decoder.model.device.type == "cpu" else self.run.batch_size,
            "code_execution": self.shut_in if benchmark.runs_code else None,
        }  # fmt: skip
        digest = sha256_bytes(json.dumps(settings, sort_keys=True).encode())
        file = self.folder / f"{benchmark.name}-{digest[:8]}.json"
        known = on_main(self.state, lambda: _read_result(file, digest))
        if known is not None:
            self.say(f"{self.folder.name} {benchmark.name}: {_shown(known)}, from {file.name}")
            return known
        self.say(f"{self.folder.name} {benchmark.name}: begins")
        start = time.perf_counter()
        found = self._evaluate(benchmark, lm, file.stem)
        cut = set(gather_object(sorted(lm.cut)))  # every process asked its share
        if found is None:
            return {}
        scores, numbers, samples = found
        counts = self.student.writer.decoder.counts
        result = {
            "benchmark": benchmark.name, "settings_hash": digest, "settings": settings, **numbers,
            "documents": len(scores), "stderr": standard_error([score for _, _, score in scores]),
            "truncated_prompts": len(cut), "seconds": round(time.perf_counter() - start, 1),
            "forwards": counts.forwards, "token_forwards": counts.token_forwards, "processes": self.num_processes,
            "scores": scores,
        }  # fmt: skip
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        atomic_write(file.with_suffix(".samples.jsonl"), lines.encode(errors="replace"))
        atomic_write(file, readable_json(result))
        for answers in self.folder.glob(f"{file.stem}.answers*"):
            answers.unlink()
        self.say(f"{self.folder.name} {benchmark.name}: {_shown(result)}, {result['seconds']:,} s")
        return result

    def _model(self, benchmark: Benchmark) -> "TideLM":
        from .lm_eval_model import TideLM

        asked = self.config.decoding
        fixed = {name: value for name, value in benchmark.decoding.items() if name not in self.run.overrides}
        if "max_new_tokens" in self.run.overrides and "steps" not in self.run.overrides:
            fixed["steps"] = asked.max_new_tokens  # still one token a step
        config = replace(self.config, decoding=replace(asked, **fixed))
        counts = self.student.writer.decoder.counts
        counts.forwards = counts.token_forwards = 0
        lm = TideLM(self.student, batch_size=self.run.batch_size, config=config)
        said = time.monotonic()

        def tell(done: int, asked: int) -> None:
            nonlocal said
            if time.monotonic() - said > _PROGRESS_S:
                said = time.monotonic()
                self.say(f"{self.folder.name} {benchmark.name}: {done:,} of {asked:,} requests answered")

        lm.progress = tell
        return lm

    def _evaluate(
        self, benchmark: Benchmark, lm: "TideLM", stem: str
    ) -> tuple[list[tuple[str, int, float]], dict[str, Any], list[dict[str, Any]]] | None:
        """Scores by document, lm-eval's numbers, and samples; None on all processes but the first."""
        from lm_eval.api.model import CachingLM
        from lm_eval.evaluator import evaluate

        from .lm_eval_model import CUT_KEY

        evaluation = self.config.evaluation
        metric = CodeEval(
            time_s=evaluation.code_time_s, memory_mb=evaluation.code_memory_mb, allowed=self.run.allow_code,
            unsafe=self.run.unsafe_code,
        )  # fmt: skip
        try:
            tasks = on_every_process(self.num_processes, lambda: load_tasks(benchmark, self.run.data, metric))
        except TideError as error:
            self.met_by_all = error
            raise
        cached: Any = CachingLM(lm, str(self.folder / f"{stem}.answers-{lm.rank}.db"))
        with contextlib.closing(cached.dbdict):
            results: Any = evaluate(
                cached, tasks, limit=self.run.limit, bootstrap_iters=0, log_samples=True, apply_chat_template=True,
                fewshot_as_multiturn=False, confirm_run_unsafe_code=self.run.allow_code,
            )  # fmt: skip
            lm.cut |= {key.removeprefix(CUT_KEY) for key in cached.dbdict if key.startswith(CUT_KEY)}
        if results is None:
            return None
        name, _, filtered = benchmark.metric.partition(",")
        kept = [
            (task, sample) for task, samples in results["samples"].items() for sample in samples
            if sample["filter"] == filtered
        ]  # fmt: skip
        if not kept or name not in kept[0][1]:
            raise DataError(f"{benchmark.name}: lm-eval reports no {benchmark.metric}; its version is another one")
        kept.sort(key=lambda item: (item[0], item[1]["doc_id"]))
        scores = [(task, int(sample["doc_id"]), float(sample[name])) for task, sample in kept]
        reported = results["results"][benchmark.task]
        numbers = {k: v for k, v in reported.items() if isinstance(v, float) and "stderr" not in k}
        samples = [
            # a process with a document less than others asks its last request again: the first answer counts
            {"task": task, "doc_id": sample["doc_id"], "score": float(sample[name]), "target": str(sample["target"]),
             "written": [str(answers[0]) for answers in sample["resps"]]}
            for task, sample in kept
        ]  # fmt: skip
        return scores, {"score": reported[benchmark.metric], "lm_eval_results": numbers}, samples


def _read_result(file: Path, digest: str) -> dict[str, Any] | None:
    """A finished result of the same settings."""
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) and known.get("settings_hash") == digest else None


def _data_digest(data: Path | None) -> str:
    """Names and sizes of the files of --data: a copy in another place is the same data."""
    if data is None:
        return "hub"
    files = sorted(file for file in data.rglob("*") if file.is_file())
    names = "".join(f"{file.relative_to(data)} {file.stat().st_size}\n" for file in files)
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def _shown(result: Mapping[str, Any]) -> str:
    error = f" ± {100 * result['stderr']:.2f}" if result["stderr"] is not None else ""
    documents = f"{result['documents']:,} document{'s' * (result['documents'] != 1)}"
    cut = f", {result['truncated_prompts']:,} prompts cut" if result["truncated_prompts"] else ""
    return f"{100 * result['score']:.2f} %{error} of {documents}{cut}"
