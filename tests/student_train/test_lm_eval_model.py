"""The model class that lm-eval meets: order, batches, seeds, caches, lengths and settings."""

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from tide.shared.errors import ConfigError, DataError
from tide.student_train.lm_eval_model import CUT_KEY, THINK_PREFIX, OpenStudent, TideLM, open_student
from tide.student_train.sampling import Decoder
from tiny_runs import tiny_config, write_model

TEXTS = ["How many clips did she sell?", "def clamp(x, low, high)", "Say yes.", "import os: does the path exist?", "Q"]


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> OpenStudent:
    """Opened once; a real tokenizer and two random layers."""
    root = tmp_path_factory.mktemp("student")
    write_model(root / "student", "student", seed=2)
    return open_student(tiny_config(root))


def model(student: OpenStudent, **arguments: Any) -> TideLM:
    """With arguments as lm-eval's command gives them."""
    return TideLM(student, **{"max_new_tokens": 12, "draws": 8, **arguments})


def asked(*texts: str, **wishes: Any) -> list[Instance]:
    """Requests to write."""
    return [Instance("generate_until", {}, (text, {"until": [], **wishes}), 0) for text in texts]


def compared(context: str, *options: str) -> list[Instance]:
    """Requests for likelihoods."""
    return [Instance("loglikelihood", {}, (context, option), n) for n, option in enumerate(options)]


def test_lm_eval_finds_it_by_name():
    assert get_model("tide") is TideLM


def test_order_and_batch_change_no_answer(student):
    lm = model(student, temperature=0.8, batch_size=1)
    alone = [lm.generate_until(asked(text, do_sample=True))[0] for text in TEXTS]
    assert len(set(alone)) == len(TEXTS)
    for batch_size in (2, 5):
        other = model(student, temperature=0.8, batch_size=batch_size)
        assert other.generate_until(asked(*TEXTS, do_sample=True)) == alone
        assert other.generate_until(asked(*TEXTS[::-1], do_sample=True)) == alone[::-1]
    assert model(student, temperature=0.8, seed=1).generate_until(asked(*TEXTS, do_sample=True)) != alone


def test_a_repeated_request_gets_another_answer_and_its_copy_the_same(student):
    (request,), (copy,) = asked(TEXTS[0]), asked(TEXTS[0])
    lm = model(student, temperature=1.5)
    first, second, third = lm.generate_until([request, request, copy])
    assert first != second
    assert third == first, "another document with the same text is the same question"


def test_order_and_company_change_no_likelihood(student):
    lm = model(student)
    questions = [compared(text, " yes", " no", " the whole of it, in words", " n") for text in TEXTS]
    alone = [lm.loglikelihood([request], disable_tqdm=True)[0] for question in questions for request in question]
    together = [request for question in questions for request in question]
    assert lm.loglikelihood(together, disable_tqdm=True) == alone
    assert lm.loglikelihood(together[::-1], disable_tqdm=True) == alone[::-1]
    assert model(student, batch_size=7).loglikelihood(together, disable_tqdm=True) == alone
    assert model(student, seed=5).loglikelihood(together, disable_tqdm=True) != alone, "long answers are sampled"


def test_a_whole_text_is_the_sum_of_its_windows(student):
    lm = model(student, max_length=20)
    text = " ".join(TEXTS)
    ids = lm.tok_encode(text)
    assert len(ids) > 40
    (whole,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    (longer,) = model(student).loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert whole < 0
    assert longer != whole, "more context, another likelihood"
    assert not lm.cut, "windows lose nothing"


def test_a_tasks_wishes_count_unless_the_model_was_told(student):
    def settings(arguments: dict[str, Any], **wishes: Any) -> Any:
        return TideLM(student, **arguments)._settings(wishes)

    assert settings({}, max_gen_toks=7).max_new_tokens == 7
    assert settings({"max_new_tokens": 5}, max_gen_toks=7).max_new_tokens == 5
    assert settings({}, do_sample=True, temperature=0.5).temperature == 0.5
    assert settings({}, do_sample=False, temperature=0.5).temperature == 0.0
    assert settings({}, temperature=0.5).temperature == 0.5
    assert settings({"temperature": 0.25}, do_sample=False).temperature == 0.25
    assert settings({"top_p": 0.5}, top_p=0.9).top_p == 0.5
    assert settings({}, until=["Q:", "", "Q:", "\n"]).stop == ("Q:", "\n")
    assert settings({}, until="Q:").stop == ("Q:",)


def test_stop_texts_end_answers(student):
    lm = model(student)
    seen = []
    lm.progress = lambda done, asked: seen.append((done, asked))
    (whole,) = lm.generate_until(asked(TEXTS[1]))
    assert seen == [(1, 1)]
    stop = whole[3:5]
    (cut,) = lm.generate_until(asked(TEXTS[1], until=[stop]))
    assert cut == whole[: whole.index(stop)]


def test_long_prompts_lose_their_beginning_and_are_counted(student, monkeypatch):
    seen = []
    generate = Decoder.generate
    monkeypatch.setattr(
        Decoder, "generate", lambda self, requests, *a, **k: seen.extend(requests) or generate(self, requests, *a, **k)
    )
    lm = model(student, max_length=40)
    long = " ".join(TEXTS * 9)
    lm.generate_until(asked(long, TEXTS[2], long))
    ids = lm.tok_encode(long)
    assert [list(request.prompt_ids) for request in seen] == [ids[-28:], lm.tok_encode(TEXTS[2]), ids[-28:]]
    assert len(lm.cut) == 1, "one text"
    lm.loglikelihood(compared(long, " yes", " no"), disable_tqdm=True)
    assert lm.get_model_info()["tide_truncated"] == 2, "and its likelihoods read one context"
    with pytest.raises(DataError, match=r"text of \d+ tokens, and room for 28"):
        model(student, max_length=40, long_inputs="refuse").generate_until(asked(long))
    with pytest.raises(DataError, match="leave no room for a prompt in the 40 positions"):
        model(student, max_length=40, max_new_tokens=40).generate_until(asked(TEXTS[0]))


def test_cuts_of_answers_that_are_in_the_response_cache_are_known_again(student, tmp_path):
    long = " ".join(TEXTS * 9)
    for _ in range(2):  # a run, and one that continues it
        lm = model(student, max_length=40)
        cached: Any = CachingLM(lm, str(tmp_path / "answers.db"))
        cached.generate_until(asked(long, TEXTS[2]))
        kept = {key.removeprefix(CUT_KEY) for key in cached.dbdict if key.startswith(CUT_KEY)}
        cached.dbdict.close()
        assert len(kept | lm.cut) == 1
    assert not lm.cut, "nothing was asked again"


def test_a_response_cache_keeps_settings_and_students_apart(student, tmp_path):
    database = str(tmp_path / "answers.db")

    def cached(**arguments: Any) -> tuple[list[str], int]:
        lm = model(student, **arguments)
        before = student.writer.decoder.counts.forwards
        wrapped: Any = CachingLM(lm, database)
        answers = wrapped.generate_until(asked(*TEXTS))
        wrapped.dbdict.close()
        return answers, student.writer.decoder.counts.forwards - before

    first, work = cached(temperature=1.5)
    assert work > 0
    assert cached(temperature=1.5) == (first, 0)
    other, more_work = cached(temperature=1.5, seed=1)
    assert more_work > 0, "another setting is another key"
    assert other != first
    assert cached(temperature=1.5, seed=1) == (other, 0)
    assert cached(temperature=1.5) == (first, 0)
    retrained = student._replace(fingerprint="0" * 64)
    assert TideLM(retrained, max_new_tokens=12).settings_digest != TideLM(student, max_new_tokens=12).settings_digest


def test_every_setting_is_in_the_names_of_caches(student):
    names = [
        model(student, **arguments).tokenizer_name
        for arguments in (
            {}, {"steps": 3}, {"threshold": 0.9}, {"guidance": 1.0}, {"precision": "bf16"}, {"draws": 9}, {"seed": 1},
            {"think_prefix": "append"}, {"max_length": 100}, {"prompt_alignment": "boundary"}, {"block_size": 4},
        )
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert model(student, batch_size=9).tokenizer_name == names[0], "a batch is no setting"


def test_a_likelihood_is_cached_as_soon_as_it_is_known(student, tmp_path):
    wrapped: Any = CachingLM(model(student), str(tmp_path / "answers.db"))
    requests = compared(TEXTS[0], " yes", " no, never")
    first = wrapped.loglikelihood(requests)
    assert len(wrapped.dbdict) == 2
    wrapped.lm._loglikelihood_tokens = None  # is not asked again
    assert wrapped.loglikelihood(requests) == first
    wrapped.dbdict.close()


def test_the_think_prefix_is_the_templates_or_appended(student):
    messages = [{"role": "user", "content": "Say yes."}]
    plain = model(student).apply_chat_template(messages)
    assert THINK_PREFIX not in plain, "this student's template has none"
    appended = model(student, think_prefix="append").apply_chat_template(messages)
    assert appended == plain + THINK_PREFIX
    begun = [*messages, {"role": "assistant", "content": "def f():"}]
    assert model(student).apply_chat_template(begun, add_generation_prompt=False).endswith("def f():")


@pytest.mark.parametrize(("prefix", "end"), [("\n```python\n", "```python"), ("Here:\n```python\nx\n", "python\nx\n")])
def test_a_begun_answer_ends_as_tasks_expect_it(student, prefix, end):
    begun = [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": prefix}]
    assert model(student).apply_chat_template(begun, add_generation_prompt=False).endswith(end)


def test_unknown_arguments_are_refused_with_a_suggestion(student):
    with pytest.raises(ConfigError, match=r"no argument 'max_new_token'.*max_new_tokens"):
        TideLM(student, max_new_token=3)
    with pytest.raises(ConfigError, match=r"think_prefix"):
        TideLM(student, think_prefix="sometimes")


def test_weights_and_tokenizer_make_the_fingerprint(student, tmp_path):
    same = write_model(tmp_path / "same" / "student", "student", seed=2)
    other = write_model(tmp_path / "other" / "student", "student", seed=3)
    assert _fingerprint(same) == student.fingerprint
    assert _fingerprint(other) != student.fingerprint


def _fingerprint(folder: Path) -> str:
    return open_student(tiny_config(folder.parent)).fingerprint


def test_a_device_is_obeyed_but_for_the_one_that_lm_eval_always_names_and_changes_no_key(student):
    key = TideLM(student).settings_digest
    assert TideLM(student, device="cuda:0").settings_digest == key
    assert TideLM(student, device="cpu").settings_digest == key
    assert "device" not in TideLM(student, device="cpu").get_model_info()["tide_decoding"]
    with pytest.raises(ConfigError, match=r"decoding.device = 'mtia': this machine has"):
        TideLM("unused", device="mtia")
