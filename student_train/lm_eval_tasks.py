"""lm-eval's tasks, loaded for a benchmark: from a folder or the Hub, and with tide's metric where code is run.

lm-eval names every task of its 14,000 files before it loads one; here just the folders of the benchmark are looked at.
`import lm_eval` stays inside functions: tide works without it.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..shared.errors import DataError, TideError, Unavailable
from .code_sandbox import CodeEval
from .tide8 import Benchmark

OWN_TASKS = Path(__file__).with_name("eval_tasks")
_CODE_MODULES = ("lm_eval.tasks.humaneval.utils", "lm_eval.tasks.mbpp.utils")
_FEWSHOT_SEED = 1234
"""lm-eval's default."""


def require_lm_eval() -> None:
    """Raises: Unavailable: lm-eval is not installed, or not its part for mathematics."""
    for package in ("lm_eval", "math_verify"):
        if importlib.util.find_spec(package) is None:
            raise Unavailable(
                f"tide eval runs on lm-eval, and the package {package} is not installed: "
                "pip install 'tide-distill[eval]'"
            )


def load_tasks(benchmark: Benchmark, data: Path | None, code_eval: CodeEval) -> Any:
    """The tasks of a benchmark and their data, as lm-eval's TaskManager gives them.

    Args:
        data: folder with the data sets as local copies, e.g. `openai/gsm8k`; None: this folder, or the Hub.
        code_eval: what tasks get when they ask for the metric of that name.
    Raises: Unavailable: a data set is neither there nor to be had. DataError: it is not what the task expects.
    """
    import lm_eval.tasks

    folders = [Path(lm_eval.tasks.__file__).parent / folder for folder in benchmark.folders]
    if data is not None and not data.is_dir():
        raise Unavailable(f"--data {data}: no such folder")
    # `datasets` looks for a data set in the current folder before it asks the Hub
    with contextlib.chdir(data or Path.cwd()), own_code_eval(code_eval):
        manager = lm_eval.tasks.TaskManager(include_path=[*folders, OWN_TASKS], include_defaults=False)
        try:
            loaded = manager.load([benchmark.task])
        except TideError:
            raise
        except (OSError, ValueError, ImportError) as error:  # datasets has no base class for what can be missing
            kind = Unavailable if isinstance(error, OSError) else DataError
            place = f"below --data {data}" if data else "on this machine"
            raise kind(
                f"{benchmark.name}: its data set was not found {place} nor on the Hub, or is not what lm-eval expects "
                f"({type(error).__name__}: {error}). docs/evaluation.md says how to lay out data for offline use"
            ) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=benchmark.shots)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


@contextlib.contextmanager
def own_code_eval(code_eval: CodeEval) -> Iterator[None]:
    """Inside, `evaluate.load("code_eval")` is ours, for tasks loaded before as well: they are read again."""
    import evaluate

    original = evaluate.load

    def load(path: str, *arguments: Any, **named: Any) -> Any:
        return code_eval if path == "code_eval" else original(path, *arguments, **named)

    for module in _CODE_MODULES:
        sys.modules.pop(module, None)
    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = original


def hellaswag_questions(documents: Any) -> Any:
    """HellaSwag's rows with `passage`, `choices` and `gold`, cleaned by lm-eval's own function."""
    clean = importlib.import_module("lm_eval.tasks.hellaswag.utils").process_docs(documents)
    return clean.rename_column("query", "passage")
