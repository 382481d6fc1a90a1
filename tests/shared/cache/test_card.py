"""The data set card: what it says, and that nothing a stranger put into a manifest acts in it."""

import dataclasses
import re

import pytest
from rendered_cards import HOSTILE, TAGS, Rendered, parts
from tide.shared.cache import read_manifest
from tide.shared.cache.card import Licences, card_text, required_licences, size_category
from tide.shared.cache.manifest import DataSource, Manifest
from tide.shared.errors import ConfigError
from tide.shared.licences import hub_fields
from tide.shared.shown_text import markdown_text


@pytest.fixture
def manifest(make_cache) -> Manifest:
    return read_manifest(make_cache("topk"))


def with_text(manifest: Manifest, text: str) -> Manifest:
    """A manifest that says `text` wherever a stranger may write something; not all of these pass `Manifest.check`."""
    assert manifest.teacher
    names = ("id", "revision", "weight_fingerprint", "dtype", "tokenizer_fingerprint", "chat_template_fingerprint",
             "licence")  # fmt: skip
    teacher = dataclasses.replace(manifest.teacher, **dict.fromkeys(names, text), spec={text: text})
    student = dataclasses.replace(manifest.student, tokenizer_fingerprint=text, chat_template_fingerprint=text)
    signal = dataclasses.replace(manifest.signal, support=text, codec_error={text: 1})
    return dataclasses.replace(
        manifest, teacher=teacher, student=student, signal=signal, sources=(DataSource(text, text, text),),
        noise={text: text}, dropped={text: 1}, tide_version=text,
    )  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_a_strangers_text_is_data_in_yaml_and_shows_as_itself_in_markdown(manifest, text):
    honest, _ = parts(card_text(manifest, repository="me/cache"))
    front, body = parts(card_text(with_text(manifest, text), repository="me/cache"))
    assert set(front) <= {*honest, "license_name"}
    assert (front["license"], front["tags"], front["configs"]) == ("other", honest["tags"], honest["configs"])
    shown = " ".join(text.replace("\u202e", "�").replace("\x1b]0;title\x07", "").replace("\u2028", " ").split())
    expected = Rendered(parts(card_text(with_text(manifest, "plain"), repository="me/cache"))[1])
    card = Rendered(body)
    assert card.tags == expected.tags
    assert set(card.tags) <= TAGS
    assert card.attributes == []
    assert card.cells[card.cells.index("Model") + 1] == shown
    assert not re.search(r"https?://evil|www\.evil|@evil", body)  # nothing for a renderer that links bare addresses


def test_markdown_text_leaves_ordinary_names_readable():
    name = "Qwen/Qwen3-0.6B, 1.5 (bf16) ü"
    assert markdown_text(name) == name
    assert markdown_text("a|b\nc") == "a&#124;b c"


def test_a_card_says_all_that_the_manifest_must(manifest):
    front, body = parts(card_text(manifest, Licences("apache-2.0", ("odc-by",)), repository="me/cache"))
    assert front == {
        "pretty_name": "tide cache of org/teacher",
        "license": ["apache-2.0", "odc-by"],
        "tags": ["tide", "distillation", "diffusion-language-model", "signal-topk"],
        "size_categories": ["n<1K"],
        "configs": [
            {"config_name": "default", "default": True, "data_files": [{"split": "train", "path": "data/*.parquet"}]},
            {"config_name": "preview", "data_files": [{"split": "train", "path": "preview/*.parquet"}]},
        ],
    }
    cells = Rendered(body).cells
    said = dict(zip(cells[::2], cells[1::2], strict=True))
    assert said["Model"] == "org/teacher"
    assert said["Weights (fingerprint)"] == "11"
    assert said["Precision"] == "float32"
    assert said["Loss support"] == "shared: all"
    assert said["Temperatures"] == "1, 2"
    assert said["Block size"] == "8"
    assert said["Codec"] == "plain, float16"
    assert said["Plan"] == manifest.plan_hash
    assert said["Manifest"] == manifest.hash
    assert said["Views (rows)"] == "30"
    assert said["Source 1"] == "stdlib at 1 (licence: odc-by)"
    assert said["seed"] == "0"
    assert said["Left out"] == "2 of 12 samples are left out (too long: 2)"
    assert cells.count("1f3a" * 16) == 1


def test_a_local_card_has_no_preview_and_may_be_of_unknown_licence(manifest):
    front, _ = parts(card_text(manifest))
    assert [config["config_name"] for config in front["configs"]] == ["default"]
    assert front["license"] == ["apache-2.0", "unknown"]


@pytest.mark.parametrize(
    "declared, fields",
    [
        (["mit"], {"license": "mit"}),
        (["mit", "mit"], {"license": "mit"}),
        (["apache-2.0", "mit, odc-by"], {"license": ["apache-2.0", "mit", "odc-by"]}),
        (["mit", "Our own"], {"license": "other", "license_name": "mit-our-own"}),
        (["<>"], {"license": "other", "license_name": "custom"}),
        ([], {"license": "unknown"}),
    ],
)
def test_licences_are_written_as_the_hub_wants_them(declared, fields):
    assert hub_fields(declared) == fields


def test_both_licences_are_required_and_the_message_names_the_option(manifest):
    with pytest.raises(ConfigError, match="licence of the data is unknown.*--data-licence"):
        required_licences(manifest)
    assert required_licences(manifest, data="mit") == Licences("apache-2.0", ("mit",))
    teacherless = with_text(manifest, "unknown")
    with pytest.raises(ConfigError, match="licence of the teacher .unknown. is unknown.*--teacher-licence"):
        required_licences(teacherless, data="mit")
    assert required_licences(teacherless, teacher="gemma", data="mit") == Licences("gemma", ("mit",))


@pytest.mark.parametrize("licence", ["unknown", "", " ", "a\nb"])
def test_an_empty_answer_is_no_licence(manifest, licence):
    with pytest.raises(ConfigError, match="--data-licence .*expected the name of a licence"):
        required_licences(manifest, data=licence)


def test_an_option_does_not_contradict_the_manifest(manifest):
    with pytest.raises(ConfigError, match="--teacher-licence mit: the manifest declares apache-2.0"):
        required_licences(manifest, teacher="mit", data="mit")


@pytest.mark.parametrize(
    "rows, name", [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (5 * 10**8, "100M<n<1B"), (10**12, "n>1T")]
)
def test_sizes_have_the_hubs_names(rows, name):
    assert size_category(rows) == name
