"""`generate` in its many ways finds what a plain loop without a cache finds.

Greedy choices are compared as tokens: between the best and the second-best logit of these random models lies far more
than the rounding that another order of summation brings.
"""

import copy

import pytest
import torch
from small_models import FAMILIES, VOCABULARY, padded, random_ids, small_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast, pipeline

NEW_TOKENS = 12
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu", reason="transformers' offloaded cache copies on CUDA streams"),
]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def continued(model, ids: torch.Tensor, new_tokens: int = NEW_TOKENS) -> torch.Tensor:
    """Greedy continuation without cache or padding: the whole row anew for every token. `ids` [B, T] → [B, T + new]."""
    with torch.no_grad():
        for _ in range(new_tokens):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def generate(model, ids: torch.Tensor, **kwargs):
    """Greedy by default, and never stopped early by an end-of-sequence token."""
    greedy = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None}
    return model.generate(ids, **{"attention_mask": torch.ones_like(ids), **greedy, **kwargs})


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        pytest.param({"cache_implementation": "offloaded"}, marks=NEEDS_CUDA),
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_greedy(family, attn_implementation, kwargs):
    device = DEVICE if kwargs.get("cache_implementation") == "offloaded" else "cpu"
    model = small_model(family, attn_implementation).to(device)
    ids = random_ids(1, 9).to(device)
    if "prompt_lookup_num_tokens" in kwargs:
        ids = continued(model, ids)  # so that some of what it looks up is accepted
    assert generate(model, ids, **kwargs, disable_compile=True).tolist() == continued(model, ids).tolist()


def test_mtp_layers_do_not_change_plain_generation(family):
    ids = random_ids(2, 9)
    model = small_model(family, num_nextn_predict_layers=2)
    assert generate(model, ids).tolist() == continued(model, ids).tolist()


@pytest.mark.parametrize("kwargs", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_left_padded_rows_continue_as_they_do_alone(family, attn_implementation, kwargs):
    model = small_model(family, attn_implementation)
    rows = [random_ids(length, seed=length) for length in (9, 4, 1)]
    ids, mask = padded(rows, "left")
    output = generate(model, ids, attention_mask=mask, **kwargs)[:, 9:]
    expected = torch.cat([continued(model, row[None])[:, len(row) :] for row in rows])
    assert output.tolist() == expected.tolist()


def test_sampling(family):
    model = small_model(family)
    ids = random_ids(2, 9)
    assert generate(model, ids, do_sample=True, top_k=1).tolist() == continued(model, ids).tolist()

    def sample(**kwargs):
        torch.manual_seed(0)
        return generate(model, ids, do_sample=True, top_k=0, **kwargs).tolist()

    assert sample() == sample(use_cache=False)
    assert sample() != continued(model, ids).tolist()


@pytest.mark.parametrize("kwargs", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str)
def test_beams_reorder_the_cache(family, kwargs):
    model = small_model(family)
    ids, mask = padded([random_ids(9), random_ids(5, seed=2)], "left")
    beams = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask}
    expected = generate(model, ids, **beams, use_cache=False)
    assert generate(model, ids, **beams, **kwargs).tolist() == expected.tolist()
    assert expected[0].tolist() != generate(model, ids, attention_mask=mask)[0].tolist()  # more than greedy search


@pytest.mark.parametrize("kind", ["returned", "given"])
def test_continuing_from_a_cache(family, kind):
    model = small_model(family)
    ids = random_ids(1, 9)
    cache = DynamicCache(config=model.config) if kind == "given" else None
    first = generate(model, ids, max_new_tokens=5, past_key_values=cache, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 13  # the last token has not been an input yet
    longer = torch.cat([first.sequences, random_ids(1, 4, seed=2)], dim=1)
    second = generate(model, longer, past_key_values=first.past_key_values)
    assert second.tolist() == continued(model, longer).tolist()


def test_one_cached_prompt_serves_two_continuations(family):
    model = small_model(family)
    prompt = random_ids(1, 9)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
    for seed in (2, 3):
        ids = torch.cat([prompt, random_ids(1, 3, seed=seed)], dim=1)
        output = generate(model, ids, past_key_values=copy.deepcopy(cache))
        assert output.tolist() == continued(model, ids).tolist()


def test_a_cropped_cache_forgets(family):
    """What assisted decoding does with rejected tokens."""
    model = small_model(family)
    ids = random_ids(1, 12)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-4)
        other = torch.cat([ids[:, :8], random_ids(1, 3, seed=2)], dim=1)
        logits = model(other[:, 8:], past_key_values=cache, use_cache=True).logits
        expected = model(other).logits[:, 8:]
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)  # float32 logits of magnitude 10


def test_assisted_decoding(family):
    model = small_model(family)
    ids = random_ids(1, 9)
    expected = continued(model, ids).tolist()
    other = small_model(family, num_hidden_layers=1)
    same = small_model(family)
    for assistant in (other, same):  # one that is mostly rejected, one that never is
        assert generate(model, ids, assistant_model=assistant).tolist() == expected


def test_embedded_prompt(family):
    model = small_model(family)
    ids = random_ids(2, 9)
    output = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids),
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
    )
    assert output.tolist() == continued(model, ids)[:, 9:].tolist()


def test_outputs_of_every_step(family):
    model = small_model(family, "eager")
    flags = {"output_scores": True, "output_attentions": True, "output_hidden_states": True}
    output = generate(model, random_ids(2, 9), max_new_tokens=3, return_dict_in_generate=True, **flags)
    assert len(output.scores) == len(output.attentions) == len(output.hidden_states) == 3
    assert [step[0].shape for step in output.attentions] == [(2, 4, 9, 9), (2, 4, 1, 10), (2, 4, 1, 11)]
    assert all(len(step) == 4 for step in output.hidden_states)


def test_text_generation_pipeline(family):
    special = ["<pad>", "<bos>", "<eos>"]
    words = special + [f"w{i}" for i in range(len(special), VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
    model = small_model(family)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    rows = [random_ids(length, seed=length) for length in (6, 3)]
    texts = [" ".join(words[i] for i in row) for row in rows]
    settings = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "return_full_text": False}
    for batch_size in (1, 2):
        output = write(texts, batch_size=batch_size, **settings)
        for row, (answer,) in zip(rows, output, strict=True):
            expected = continued(model, row[None], 5)[0, len(row) :]
            assert answer["generated_text"].split() == [words[i] for i in expected if words[i] not in special]
