"""The paper's protocol as one table: which tasks, how they are asked, and what the paper reports.

Sources: the authors' published evaluation script (scripts/eval_all.sh) for tasks, shots, lengths and steps, and the
table of main results in their README (PKU-YuanGroup/TIDE on GitHub, read in November 2026). All of it: block 32,
temperature 0, no guidance, one token a step, the chat template with an empty think block. Whatever is asked otherwise
than in the paper stands in `remark`, or is found by evaluation_report.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..shared.config_tree import suggest
from ..shared.errors import ConfigError

SUITE = "tide8"
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Benchmark:
    """One row.

    Args:
        name: on the command line. title: in tables.
        task: lm-eval's name. folders: of lm-eval's tasks, where it is defined.
        metric: of lm-eval's results, with its filter.
        shots: worked examples in the prompt.
        new_tokens: longest answer, and its denoising steps.
        documents: in the whole data set.
        paper: scores in per cent, in the order of `PAPER_COLUMNS`.
        remark: what is not as in the paper, or not stated there.
        runs_code: scoring runs what the student wrote.
        in_suite: one of the eight.
    """

    name: str
    title: str
    task: str
    folders: tuple[str, ...]
    metric: str
    shots: int
    new_tokens: int
    documents: int
    paper: tuple[float, ...] = ()
    remark: str = ""
    runs_code: bool = False
    in_suite: bool = True

    @property
    def decoding(self) -> dict[str, int | float]:
        """Settings of `decoding` that the protocol fixes."""
        return {
            "max_new_tokens": self.new_tokens, "steps": self.new_tokens, "block_size": BLOCK_SIZE, "temperature": 0.0,
            "top_p": 1.0, "guidance": 0.0,
        }  # fmt: skip


PAPER_COLUMNS = (
    "Qwen3-0.6B, autoregressive", "BD3LM, not distilled", "B: KL", "B: TIDE-Cross", "B: TIDE-Shared", "A: CALM",
    "A: TIDE-Shared", "A: TIDE-Cross",
)  # fmt: skip
"""A: LLaDA2.0-mini, another tokenizer; B: WeDLM-8B, the same tokenizer (docs/reproducing.md)."""
PAPER_CE_ONLY, PAPER_BEST = PAPER_COLUMNS[1], PAPER_COLUMNS[-1]
PAPER_AVERAGE = (40.91, 32.67, 30.55, 30.79, 33.55, 32.25, 33.83, 34.20)
PAPER_SOURCE = "main results of arXiv 2604.26951, from the README of PKU-YuanGroup/TIDE; per cent"

BENCHMARKS = (
    Benchmark(
        "mmlu", "MMLU", "mmlu_generative", ("mmlu/generative",), "exact_match,get_response", 0, 3, 14042,
        (52.80, 39.15, 39.57, 39.09, 39.92, 39.42, 39.54, 39.59),
        "lm-eval's own reading: the answer's first line must be the letter; the paper's fork takes its first letter",
    ),
    Benchmark(
        "mmlu_pro", "MMLU-Pro", "mmlu_pro", ("mmlu_pro",), "exact_match,custom-extract", 0, 256, 12032,
        (24.70, 13.80, 13.19, 12.88, 14.48, 13.47, 14.02, 14.52),
    ),
    Benchmark(
        "hellaswag", "HellaSwag", "tide_hellaswag_letter", (), "exact_match,first-letter", 0, 3, 10042,
        (47.40, 39.28, 39.78, 39.50, 40.50, 40.42, 39.57, 39.88),
        "a question with four letters as in the paper, in tide's own words: the paper's is part of its fork",
    ),
    Benchmark(
        "gsm8k_cot", "GSM8K", "gsm8k_cot", ("gsm8k",), "exact_match,flexible-extract", 0, 256, 1319,
        (59.60, 45.56, 43.97, 45.03, 48.98, 48.60, 49.89, 52.24),
        "the last number of the answer counts (flexible-extract); the paper does not say which reading it reports",
    ),
    Benchmark(
        "bbh", "BBH", "bbh", ("bbh/cot_fewshot",), "exact_match,get-answer", 3, 256, 6511,
        (41.50, 26.32, 25.79, 26.00, 26.79, 24.21, 26.85, 27.37),
    ),
    Benchmark(
        "minerva_math", "MATH", "minerva_math", ("minerva_math", "benchmarks"), "math_verify,none", 0, 256, 5000,
        (32.40, 13.08, 9.40, 9.76, 11.16, 13.14, 12.98, 13.20),
        "math_verify, which finds boxed answers; the paper does not say which of lm-eval's two metrics it reports",
    ),
    Benchmark(
        "humaneval_instruct", "HumanEval", "humaneval_instruct", ("humaneval",), "pass@1,create_test", 0, 256, 164,
        (32.30, 46.34, 41.46, 42.68, 48.78, 43.90, 49.39, 48.17), runs_code=True,
    ),
    Benchmark(
        "mbpp_instruct", "MBPP", "mbpp_instruct", ("mbpp",), "pass_at_1,extract_code", 0, 256, 500,
        (36.60, 37.80, 31.20, 31.40, 37.80, 34.80, 38.40, 38.60), runs_code=True,
    ),
    Benchmark(
        "hellaswag_likelihood", "HellaSwag, by likelihood", "hellaswag", ("hellaswag",), "acc_norm,none", 0, 256, 10042,
        remark="lm-eval's own task: the likeliest of four endings, by length; not one of the paper's", in_suite=False,
    ),
)  # fmt: skip


def chosen_benchmarks(suite: str, names: Sequence[str], *, allow_code: bool) -> tuple[list[Benchmark], dict[str, str]]:
    """What to run, and what of the suite is left out and why.

    Args: names: empty: the whole suite, as far as it may be run.
    Raises: ConfigError: an unknown suite or benchmark; one that is named and may not be run.
    """
    if suite != SUITE:
        raise ConfigError(f"--suite {suite}: there is one suite, {SUITE}")
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--tasks: no benchmark {name!r}{suggest(name, list(known))}. Known: {', '.join(known)}. Other tasks "
                "of lm-eval: python -m tide.student_train.lm_eval_command"
            )
        if known[name].runs_code and not allow_code:
            raise ConfigError(
                f"--tasks {name}: its score comes from running code that the student wrote; add --allow-code-execution "
                "(docs/evaluation.md says how the code is shut in)"
            )
    wanted = [known[name] for name in dict.fromkeys(names)] or [b for b in BENCHMARKS if b.in_suite]
    left_out = {
        b.name: "runs code that the student wrote: needs --allow-code-execution"
        for b in wanted if b.runs_code and not allow_code
    }  # fmt: skip
    return [b for b in wanted if b.name not in left_out], left_out
