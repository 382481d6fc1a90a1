"""The prefix cache: written by one forward, then read and never changed."""

import pytest
import torch
from tide.shared.models import load_model
from tide.shared.models.prefix_cache import PrefixCache
from tiny_runs import write_model

LENGTH, MORE = 6, 4


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory):
    return load_model(write_model(tmp_path_factory.mktemp("model") / "student", "student", seed=5)).get_decoder()


@pytest.fixture
def cache(decoder) -> PrefixCache:
    cache = PrefixCache()
    ids = torch.arange(3 * LENGTH).reshape(3, LENGTH)
    everywhere = torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool)
    with torch.no_grad():
        decoder(input_ids=ids, attention_mask=everywhere, past_key_values=cache, use_cache=True)
    return cache.freeze()


def read(decoder, cache: PrefixCache, num_rows: int) -> torch.Tensor:
    """Hidden states of rows of `MORE` new tokens that see the prefix and each other."""
    with torch.no_grad():
        return decoder(
            input_ids=torch.full((num_rows, MORE), 40),
            position_ids=torch.arange(LENGTH, LENGTH + MORE).expand(num_rows, -1),
            attention_mask=torch.ones(num_rows, 1, MORE, LENGTH + MORE, dtype=torch.bool),
            past_key_values=cache, use_cache=False,
        ).last_hidden_state  # fmt: skip


def test_reading_leaves_it_as_it_is(decoder, cache):
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    assert len(before) == 2
    first, second = read(decoder, cache, 3), read(decoder, cache, 3)
    assert torch.equal(first, second)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert layer.keys.shape[-2] == LENGTH
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_a_read_equals_one_forward_over_prefix_and_new_tokens(decoder, cache):
    ids = torch.cat([torch.arange(3 * LENGTH).reshape(3, LENGTH), torch.full((3, MORE), 40)], dim=1)
    mask = torch.ones(LENGTH + MORE, LENGTH + MORE, dtype=torch.bool)
    mask[:LENGTH, LENGTH:] = False
    with torch.no_grad():
        whole = decoder(input_ids=ids, attention_mask=mask.expand(3, 1, -1, -1), use_cache=False).last_hidden_state
    torch.testing.assert_close(read(decoder, cache, 3), whole[:, LENGTH:], atol=1e-5, rtol=0)


def test_rows_repeat_and_reorder_the_samples(decoder, cache):
    index = torch.tensor([2, 0, 2, 2])
    every, chosen = read(decoder, cache, 3), read(decoder, cache.rows(index), 4)
    torch.testing.assert_close(chosen, every[index], atol=1e-6, rtol=0)
    assert cache.layers[0].keys.shape[0] == 3


def test_a_cache_that_was_never_written_cannot_be_read():
    cache = PrefixCache()
    assert cache.freeze() is cache
    cache.layers.append(cache.layer_class_to_replicate())
    with pytest.raises(ValueError, match="the prefix cache is empty"):
        cache.rows(torch.tensor([0]))
