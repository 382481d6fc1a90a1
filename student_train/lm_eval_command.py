"""lm-eval's own command with tide's students in it: `python -m tide.student_train.lm_eval_command run --model tide`.

lm-eval 0.4.13 looks for no plug-ins: its command knows the models of its own package, and nothing on the command line
makes it import another. So this one registers the model and starts it. Every argument is lm-eval's. Tasks that run code
get tide's sandbox (code_sandbox.py) in place of the metric that lm-eval would fetch, and want what lm-eval wants:
`--confirm_run_unsafe_code` and HF_ALLOW_CODE_EVAL=1; HF_ALLOW_CODE_EVAL=unsafe-inside-container leaves the sandbox out.
"""

import os
import sys

from ..shared.config import EvaluationConfig
from ..shared.errors import TideError
from ..shared.stop_signals import StopAsked, end_on_signals
from .code_sandbox import UNSAFE, CodeEval
from .lm_eval_tasks import own_code_eval, require_lm_eval


def main() -> None:
    """Run lm-eval's command; a TideError is one message and its exit code."""
    try:
        require_lm_eval()
        from lm_eval.__main__ import cli_evaluate

        from . import lm_eval_model  # noqa: F401  (registers the model)

        limits = EvaluationConfig()
        leave = os.environ.get("HF_ALLOW_CODE_EVAL")
        metric = CodeEval(
            time_s=limits.code_time_s, memory_mb=limits.code_memory_mb, allowed=leave in ("1", UNSAFE),
            unsafe=leave == UNSAFE,
        )  # fmt: skip
        with end_on_signals(), own_code_eval(metric):
            cli_evaluate()
    except (TideError, StopAsked) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
