"""The card of a published student: nothing a stranger wrote acts in it, and what is not known is not said."""

import dataclasses
import re

import pytest
from rendered_cards import HOSTILE, TAGS, Rendered, parts
from tide.shared.cache.card import Licences
from tide.shared.cache.manifest import DataSource, TeacherInfo
from tide.shared.cache.trained_from import TRAINED_FROM_NAME, TrainedFrom, read_trained_from
from tide.shared.errors import CacheError
from tide.student_train.evaluation_scores import TaskScore
from tide.student_train.public_card import Cost, StudentFacts, public_card


def facts(text: str = "plain") -> StudentFacts:
    """A student of which everything says `text` that a stranger may have written."""
    teacher = TeacherInfo(text, text, text, text, text, text, text, text, {text: text})
    origin = TrainedFrom(text, text, text, text, "topk", teacher, (DataSource(text, text, text),), {text: text}, 3, 30)
    return StudentFacts(
        "me/student", origin, Licences(text, (text,)), start="org/start", start_licence=text,
        settings={"losses.0.name": text, "train.lr": text, "train.max_views": None}, steps=7,
        model_class="Qwen3ForCausalLM", model_type="a2d-qwen3", block_size=8, mask_id=511, num_parameters=10,
        scores=[TaskScore(text, text, 0.5, None, None)], heldout={}, cost=Cost(hardware=text),
    )  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_a_strangers_text_is_data_in_yaml_and_shows_as_itself_in_markdown(text: str) -> None:
    honest, plain = parts(public_card(facts()))
    front, body = parts(public_card(facts(text)))
    assert set(front) <= {*honest, "license_name"}
    assert (front["license"], front["tags"], front["base_model"]) == ("other", honest["tags"], "org/start")
    card = Rendered(body)
    assert card.tags == Rendered(plain).tags
    assert set(card.tags) <= TAGS | {"p"}
    assert card.attributes == []
    shown = " ".join(text.replace("\u202e", "�").replace("\x1b]0;title\x07", "").replace("\u2028", " ").split())
    assert card.cells.count(shown) == Rendered(plain).cells.count("plain") > 10
    assert not re.search(r"https?://evil|www\.evil|@evil", body)


def test_what_nobody_stated_is_left_out() -> None:
    bare = dataclasses.replace(facts(), scores=[], cost=Cost(), start=None, start_licence=None)
    front, body = parts(public_card(bare))
    assert not {"model-index", "co2_eq_emissions", "base_model"} & set(front)
    assert "## Evaluation" not in body
    assert "## What it cost" not in body
    told = dataclasses.replace(bare, heldout={"heldout_bits_per_byte": 3.25, "heldout_accuracy": 0.125})
    assert "3.250 bits per byte; 12.5 % of the masked tokens" in public_card(told)


def test_a_students_memory_of_its_cache_survives_and_a_strangers_is_refused(tmp_path) -> None:
    assert read_trained_from(tmp_path) is None
    origin = facts().origin
    (tmp_path / TRAINED_FROM_NAME).write_bytes(origin.to_bytes())
    assert read_trained_from(tmp_path) == origin
    sound = origin.to_bytes().decode()
    for bent in (sound[:-9], sound.replace('"topk"', '"to\\u001bpk"'), sound.replace('"samples": 3', '"samples": -3'),
                 sound.replace('"samples"', '"sample"'), "[]"):  # fmt: skip
        (tmp_path / TRAINED_FROM_NAME).write_text(bent)
        with pytest.raises(CacheError, match=TRAINED_FROM_NAME):
            read_trained_from(tmp_path)
