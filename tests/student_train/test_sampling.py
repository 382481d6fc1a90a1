"""Block-wise decoding against a twin that computes everything anew, and against itself in other company."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from tide.shared.config import DecodingConfig
from tide.shared.errors import ConfigError, DataError
from tide.shared.models.a2d import A2DLlamaConfig, A2DLlamaLMHeadModel, A2DQwen2Config, A2DQwen2LMHeadModel
from tide.student_train import block_cache
from tide.student_train.open_answer import plan_blocks
from tide.student_train.sampling import Decoder, Generation, Request, Snapshot, answer_settings
from tiny_caches import MASK, VOCAB
from tiny_decoders import naive_answer, prompts, tiny_decoder

ODD = (1, 7, 8, 13, 31, 32, 33)


def answers(decoder: Decoder, requests: list[Request], batch_size: int = 3, **settings: Any) -> list[tuple[int, ...]]:
    return [g.ids for g in decoder.generate(requests, DecodingConfig(**settings), batch_size=batch_size)]


@pytest.mark.parametrize("alignment", ["training", "boundary"])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("block_size", [4, 8, 32])
def test_greedy_decoding_equals_the_naive_twin_token_for_token(block_size, guidance, alignment):
    decoder, requests = tiny_decoder(), prompts(*ODD)
    settings = {"max_new_tokens": 37, "steps": 20, "block_size": block_size}
    settings |= {"guidance": guidance, "prompt_alignment": alignment}
    twin = [naive_answer(decoder, request, DecodingConfig(**settings)).ids for request in requests]
    assert len(set(twin)) == len(requests), "prompts matter"
    assert answers(decoder, requests, **settings) == twin


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "guidance": 0.5, "steps": 9},
        {"threshold": 0.4, "steps": 9},
        {"threshold": 0.4, "temperature": 0.5, "prompt_alignment": "boundary"},
        {"steps": 1},
    ],
)
def test_every_way_of_choosing_equals_the_naive_twin(more):
    decoder, requests = tiny_decoder(), prompts(*ODD)
    settings = {"max_new_tokens": 27, **more}
    twin = [naive_answer(decoder, request, DecodingConfig(**settings)).ids for request in requests]
    assert answers(decoder, requests, **settings) == twin
    if "temperature" in more:
        other = [Request(request.prompt_ids, request.seed + 1) for request in requests]
        assert answers(decoder, other, **settings) != twin


@pytest.mark.parametrize("more", [{}, {"temperature": 1.0, "top_p": 0.9}, {"guidance": 1.0}, {"threshold": 0.5}])
def test_batch_and_order_change_nothing(more):
    decoder, requests = tiny_decoder(eos_id=9), prompts(*(1 + 5 * n % 37 for n in range(12)))
    settings = {"max_new_tokens": 28, **more}
    alone = [answers(decoder, [request], **settings)[0] for request in requests]
    assert len({len(ids) for ids in alone}) > 2, "answers end at different times"
    for batch_size in (2, 5, 12):
        assert answers(decoder, requests, batch_size, **settings) == alone
    assert answers(decoder, requests[::-1], 5, **settings) == alone[::-1]


@pytest.mark.parametrize(
    ("config", "model"),
    [(A2DLlamaConfig, A2DLlamaLMHeadModel), (A2DQwen2Config, A2DQwen2LMHeadModel)],
)
def test_students_on_other_networks_equal_the_twin_too(config, model):
    decoder, requests = tiny_decoder(), prompts(1, 9, 14)
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": None}
    network = model(config(vocab_size=VOCAB, attn_implementation="sdpa", **shape, **heads)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(10 if parameter.dim() == 2 else 1)
    decoder = Decoder(network, decoder.reader, 8)
    settings = DecodingConfig(max_new_tokens=20, guidance=0.5)
    twin = [naive_answer(decoder, request, settings).ids for request in requests]
    assert len(set(twin)) == 3
    assert [g.ids for g in decoder.generate(requests, settings)] == twin


def test_an_answer_ends_with_the_block_of_its_eos_and_leaves_the_batch():
    decoder, requests = tiny_decoder(eos_id=9), prompts(*range(1, 13))
    settings = DecodingConfig(max_new_tokens=64)
    results = decoder.generate(requests, settings, batch_size=4)
    twin = [naive_answer(decoder, request, settings) for request in requests]
    assert [g.ids for g in results] == [answer.ids for answer in twin]
    ended = [(g, answer) for g, answer in zip(results, twin, strict=True) if g.finish == "eos"]
    assert len(ended) > 3
    for generation, answer in ended:
        assert generation.num_forwards <= answer.num_blocks * 8
    assert any(answer.num_blocks < 8 for _, answer in ended)
    full = sum(naive.num_blocks for naive in twin) * 8
    assert sum(g.num_forwards for g in results) < full, "nothing is computed behind an EOS whose past is final"


def test_a_finished_position_is_computed_once_and_the_current_block_once_per_step(monkeypatch):
    decoder, (request,) = tiny_decoder(), prompts(21)
    seen: list[tuple[int, int]] = []
    embed = decoder.model.get_input_embeddings()

    def record(module, arguments) -> None:
        seen.extend((int(i), 0) for i in arguments[0].flatten())

    handle = embed.register_forward_pre_hook(record)
    (generation,) = decoder.generate([request], DecodingConfig(max_new_tokens=27, steps=14))
    handle.remove()
    blocks = plan_blocks(21, DecodingConfig(max_new_tokens=27, steps=14), 8, 512)
    assert [(b.start, b.first, b.last, b.stop, b.steps) for b in blocks] == [
        (16, 21, 24, 24, 2), (24, 24, 32, 32, 4), (32, 32, 40, 40, 4), (40, 40, 48, 48, 4)
    ]  # fmt: skip
    steps = sum(block.steps for block in blocks)
    # 16 positions of whole prompt blocks; each block once per step; each but the last once more, when it is clean
    assert len(seen) == 16 + 8 * steps + 8 * (len(blocks) - 1)
    assert generation.num_token_forwards == decoder.counts.token_forwards == len(seen)
    assert generation.num_forwards == decoder.counts.forwards == steps


def test_the_cache_is_written_in_place_and_never_copied(monkeypatch):
    decoder, places, reads = tiny_decoder(eos_id=9), {}, []
    attend = block_cache.scaled_dot_product_attention

    class Watched(block_cache.BlockCache):
        def layer(self, *arguments):
            pair = super().layer(*arguments)
            for name, tensor in zip(("keys", "values"), pair, strict=True):
                places.setdefault((arguments[0], name), set()).add(tensor.data_ptr())
            return pair

    def watch(query, key, value, **more):
        reads.append({key.untyped_storage().data_ptr(), value.untyped_storage().data_ptr()})
        return attend(query, key, value, **more)

    monkeypatch.setattr("tide.student_train.sampling.BlockCache", Watched)
    monkeypatch.setattr(block_cache, "scaled_dot_product_attention", watch)
    decoder.generate(prompts(*ODD), DecodingConfig(max_new_tokens=40, guidance=1.0), batch_size=3)
    assert len(places) == 4, "two layers"
    assert all(len(pointers) == 1 for pointers in places.values())
    assert len(reads) > 100
    assert set().union(*reads) == set().union(*places.values()), "attention reads the cache itself, no copy of it"


def test_neighbours_share_calls_and_rounding_stays_out_of_attention():
    """The same sequences alone and together: given the same queries, keys and values, the same bits."""
    cache = {n: block_cache.BlockCache(n, 64) for n in (1, 4)}
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(3, 1, 4, 8, 16, generator=generator) for _ in range(4)]
    blocks = np.arange(128) // 8

    def attend(slots: int, spans: list[block_cache.Span], query, key, value):
        packed = block_cache.PackedForward(cache[slots], spans, [blocks] * len(spans), 2, torch.device("cpu"))
        return packed.attend(0, query, key[:, ::2], value[:, ::2], 0.25), len(packed.calls)

    together, calls = attend(
        4, [block_cache.Span(n, 0, 0, 8) for n in range(4)], *(torch.cat([r[i] for r in rows], 2) for i in range(3))
    )
    assert calls == 1
    for n, (query, key, value) in enumerate(rows):
        alone, _ = attend(1, [block_cache.Span(0, 0, 0, 8)], query, key, value)
        assert torch.equal(alone[0], together[0, 8 * n : 8 * n + 8])
        scores = torch.einsum("hqd,hkd->hqk", query[0].double(), key[0, ::2].repeat_interleave(2, 0).double()) * 0.25
        naive = torch.einsum("hqk,hkd->qhd", scores.softmax(-1), value[0, ::2].repeat_interleave(2, 0).double())
        # float32 sums of 16 products
        torch.testing.assert_close(alone[0].double(), naive, rtol=1e-5, atol=1e-6)


def test_snapshots_show_every_step_and_end_with_the_answer():
    decoder, requests, shown = tiny_decoder(), prompts(5, 8), []
    results = decoder.generate(requests, DecodingConfig(max_new_tokens=20), watch=shown.append)
    for number, generation in enumerate(results):
        own: list[Snapshot] = [snapshot for snapshot in shown if snapshot.number == number]
        assert len(own) == 20
        assert [snapshot.generation for snapshot in own] == [None] * 19 + [generation]
        written: dict[int, int] = {}
        for snapshot in own:
            assert len(snapshot.fresh) == 1
            written |= {place: snapshot.ids[place] for place in snapshot.fresh}
            assert written == {place: i for place, i in enumerate(snapshot.ids) if i is not None}
        assert sum(snapshot.block_done for snapshot in own) == len(
            plan_blocks(5 + 3 * number, DecodingConfig(max_new_tokens=20), 8)
        )
        assert tuple(written[place] for place in range(20)) == generation.ids


def test_the_mask_and_ids_that_spell_nothing_are_never_written():
    decoder = tiny_decoder()
    with torch.no_grad():
        head = decoder.model.get_output_embeddings().weight
        head[[MASK, VOCAB - 2, VOCAB - 3]] = 50 * head[20]
    for settings in (DecodingConfig(max_new_tokens=64), DecodingConfig(max_new_tokens=64, temperature=3.0)):
        for generation in decoder.generate(prompts(3, 4, 5), settings):
            assert max(generation.ids) < VOCAB - 3


@pytest.mark.parametrize("limit", [40, 43])
def test_an_answer_may_fill_the_students_positions_and_no_more(limit):
    decoder, (request,) = tiny_decoder(), prompts(20)
    decoder.model.config.max_position_embeddings = limit
    (generation,) = decoder.generate([request], DecodingConfig(max_new_tokens=limit - 20))
    assert len(generation.ids) == limit - 20
    with pytest.raises(DataError, match=f"prompt 1 has 20 tokens.*more than the {limit} positions"):
        decoder.generate([request], DecodingConfig(max_new_tokens=limit - 19))


def test_bad_requests_are_refused_before_any_forward():
    decoder = tiny_decoder()
    for bad, error in ((Request([]), ConfigError), (Request([0, VOCAB]), DataError), (Request([-1]), DataError)):
        with pytest.raises(error, match="prompt 2"):
            decoder.generate([Request([1]), bad], DecodingConfig())
    assert decoder.counts.forwards == 0
    assert decoder.generate([], DecodingConfig()) == []


def test_a_model_without_room_for_the_mask_is_no_student():
    decoder = tiny_decoder()
    decoder.reader.mask_id = VOCAB
    with pytest.raises(ConfigError, match=f"the mask has id {VOCAB} and the model {VOCAB} embeddings"):
        Decoder(decoder.model, decoder.reader, 8)


def test_damaged_weights_end_with_a_clear_error_and_the_model_keeps_its_attention():
    decoder = tiny_decoder()
    with torch.no_grad():
        decoder.model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(DataError, match="not numbers"):
        decoder.generate(prompts(4), DecodingConfig())
    assert decoder.model.config._attn_implementation == "sdpa"


def test_bf16_writes_an_answer_of_the_same_length():
    decoder, requests = tiny_decoder(), prompts(*ODD)
    settings = DecodingConfig(max_new_tokens=30, precision="bf16")
    assert [len(g.ids) for g in decoder.generate(requests, settings)] == [30] * len(ODD)
    one = [decoder.generate([request], settings)[0] for request in requests]
    assert one == [decoder.generate([request], settings, batch_size=1)[0] for request in requests]


def test_settings_have_one_stable_json_form_that_names_all_that_change_an_answer():
    form = answer_settings(DecodingConfig(stop=("\n\n", "ß")))
    assert form["stop"] == ["\n\n", "ß"]
    assert list(form) == sorted(DecodingConfig.__dataclass_fields__.keys() - {"device"})
    assert form == answer_settings(DecodingConfig(stop=("\n\n", "ß"), device="cpu"))
    assert form != answer_settings(DecodingConfig(stop=("\n\n", "ß"), top_p=0.99))
    one, same = (answer_settings(DecodingConfig(temperature=value)) for value in (1, 1.0))
    assert json.dumps(one) == json.dumps(same)


def test_steps_are_spread_in_proportion_and_the_remainder_comes_first():
    def shape(prompt: int, **settings: Any) -> list[tuple[int, list[int]]]:
        plan = plan_blocks(prompt, DecodingConfig(**settings), 32)
        return [(block.last - block.first, [block.quota(step) for step in range(block.steps)]) for block in plan]

    assert shape(64, max_new_tokens=64, steps=20) == [(32, [4, 4] + [3] * 8)] * 2
    assert shape(64, max_new_tokens=3, steps=3) == [(3, [1, 1, 1])]
    assert shape(95, max_new_tokens=3, steps=3) == [(1, [1]), (2, [1, 1])]
    assert shape(74, max_new_tokens=64, steps=32) == [(22, [2] * 11), (32, [2] * 16), (10, [2] * 5)]
    assert shape(74, max_new_tokens=64, steps=32, prompt_alignment="boundary") == [(32, [2] * 16)] * 2
    assert shape(5, max_new_tokens=40) == [(27, [1] * 27), (13, [1] * 13)]


def test_generations_can_be_compared_and_say_why_they_end():
    decoder, (request,) = tiny_decoder(), prompts(9)
    (generation,) = decoder.generate([request], DecodingConfig(max_new_tokens=4))
    assert generation == Generation(generation.ids, decoder.reader.text(generation.ids), "length", 4, 4 * 8 + 8)
