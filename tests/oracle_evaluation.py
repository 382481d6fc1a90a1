"""`tide eval` with a student that knows every answer: run as `python oracle_evaluation.py eval ...`.

Only what it writes is replaced; prompts, filters, metrics and the sandbox are the real ones. A benchmark that reads
right answers as right scores 100 % with it.
"""

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


def _answers(self: TideLM, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    for request in requests:
        fence_opened = str(request.args[0]).endswith("```python")
        assert fence_opened == (request.task_name == "mbpp_instruct"), request.args[0]
    return [right_answer(str(request.task_name), request.doc) for request in requests]


if __name__ == "__main__":
    TideLM.generate_until = _answers  # type: ignore[method-assign]
    main()
