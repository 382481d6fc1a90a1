"""`tide eval` with a student that knows every answer: run as `python oracle_evaluation.py eval ...`.

Only what it writes is replaced; prompts, filters, metrics and the sandbox are the real ones. A benchmark that reads
right answers as right scores 100 % with it. With HOSTILE_FILE and HOSTILE_PORT set, HumanEval's answers do harm before
they are right, as far as they are let: to that file, to whoever listens at that port, and to the machine in small
measure.
"""

import os
from typing import Any

from lm_eval.api.instance import Instance
from tide.cli import main
from tide.student_train.lm_eval_model import TideLM


def right_answer(task: str, doc: dict[str, Any]) -> str:
    """What a good student might write."""
    if task.endswith("_generative"):
        return f" {'ABCD'[doc['answer']]}"
    if task.startswith("mmlu_pro_"):
        return f" Adding up, the answer is ({doc['answer']})."
    if task == "tide_hellaswag_letter":
        return f" {'abcd'[doc['gold']]}."
    if task == "gsm8k_cot":
        return f" The answer is {doc['answer'].split('####')[1].strip()}."
    if task.startswith("bbh"):
        return f" So the answer is {doc['target']}."
    if task.startswith("minerva_math"):
        return f" {doc['solution']}"
    if task == "humaneval_instruct":
        return f"{doc['canonical_solution']}\n```\nThis works."
    assert task == "mbpp_instruct", task
    return f"\n{doc['code']}\n```\nThis works."


def harmful_answer(number: int, doc: dict[str, Any]) -> str:
    """A right answer after harm of one of five kinds; each is bounded where nothing stops it."""
    file, port = os.environ["HOSTILE_FILE"], os.environ["HOSTILE_PORT"]
    harm = [
        "for _ in range(200):\n        os.fork() or (time.sleep(20), os._exit(0))",
        f"os.remove({file!r})",
        f"socket.create_connection(('127.0.0.1', {port}), timeout=5).close()",
        "while time.monotonic() < start + 60:\n        pass",
        "big = bytearray(700 << 20)",
    ][number % 5]
    return f"    import os, socket, time\n    start = time.monotonic()\n    {harm}\n{doc['canonical_solution']}\n```\n"


def _answers(self: TideLM, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    for request in requests:
        fence_opened = str(request.args[0]).endswith("```python")
        assert fence_opened == (request.task_name == "mbpp_instruct"), request.args[0]
    if "HOSTILE_FILE" in os.environ:
        return [harmful_answer(number, request.doc) for number, request in enumerate(requests)]
    return [right_answer(str(request.task_name), request.doc) for request in requests]


if __name__ == "__main__":
    TideLM.generate_until = _answers  # type: ignore[method-assign]
    main()
