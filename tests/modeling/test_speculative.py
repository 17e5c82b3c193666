"""Drafting with the MTP layers gives what decoding without them gives, in fewer forwards of the main model.

Greedy choices are compared as tokens: between the best and the second-best logit of these random models lies far more
than the rounding that another order of summation brings. Every comparison checks that drafts were accepted and refused.
"""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import FAMILIES, VOCABULARY, drafting_model, padded, random_ids, small_model
from torch import nn
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from deepseek_hf.modeling.speculative import CacheRows, Draft, accept_sampled

NEW_TOKENS = 24
TOLERANCE = {"atol": 5e-5, "rtol": 0}  # float32 logits of magnitude 10


def prompts(batch: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`: one row of 9 tokens, or rows of 9, 4, 7, … padded on the left."""
    ids, mask = padded([random_ids(length, seed=length) for length in (9, 4, 7)[:batch]], "left")
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, batch: int | dict = 1, **kwargs):
    inputs = prompts(batch) if isinstance(batch, int) else batch
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "return_dict_in_generate": True}
    return model.generate(**inputs, **{**settings, **kwargs})


def draft(model, batch: int | dict = 1, **kwargs):
    """`generate` with drafting, of which some must be accepted and some not."""
    output = generate(model, batch, use_mtp=True, **kwargs)
    assert 0 < output.statistics.acceptance_rate < 1
    return output


def late_token(row: torch.Tensor) -> int:
    """The token of a row [T] that first comes last."""
    return list(dict.fromkeys(row.tolist()))[-1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("depth", "num_draft_tokens"), [(1, 1), (2, None), (3, 2), (2, 5)])
def test_greedy_tokens_are_those_of_plain_decoding(family, batch, depth, num_draft_tokens):
    model = drafting_model(family, depth)
    expected = generate(model, batch).sequences
    output = draft(model, batch, num_draft_tokens=num_draft_tokens)
    assert output.sequences.tolist() == expected.tolist()
    statistics = output.statistics
    assert statistics.generated == batch * NEW_TOKENS
    assert statistics.main_forwards + statistics.accepted == batch * (NEW_TOKENS - 1)
    assert statistics.tokens_per_forward == batch * (NEW_TOKENS - 1) / statistics.main_forwards > 1
    assert statistics.drafted <= (num_draft_tokens or depth) * statistics.main_forwards
    assert statistics.drafting_seconds > 0 and 0 < statistics.estimated_speed_up < statistics.tokens_per_forward


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_attention_backends(attn_implementation):
    model = drafting_model("v3", 2)
    model.set_attn_implementation(attn_implementation)
    assert draft(model, 3).sequences.tolist() == generate(model, 3).sequences.tolist()


def test_without_a_dict_the_tokens_come_alone():
    model = drafting_model("v3", 1)
    output = generate(model, 3, use_mtp=True, return_dict_in_generate=False)
    assert output.tolist() == generate(model, 3).sequences.tolist()


def test_drafts_are_the_mtp_layers_guesses():
    """With every draft right by construction, a round gives them all: the main model repeats the token it reads."""
    model = small_model("v3", num_nextn_predict_layers=2, tie_word_embeddings=True)
    hidden = model.config.hidden_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
            elif "eh_proj" in name:
                parameter.copy_(torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], dim=1))
    for num_draft_tokens in (1, 2, 4):
        output = generate(model, 3, use_mtp=True, num_draft_tokens=num_draft_tokens, max_new_tokens=21)
        assert output.statistics.acceptance_rate == 1
        assert output.statistics.main_forwards == 3 * -(-20 // (num_draft_tokens + 1))


def chi_square_excess(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """(χ² - mean) / standard deviation of χ² of `counts` under `probabilities`, both [cells]: below 5 but once in a
    million times. Cells that expect fewer than 5 are counted as one."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    return (((counts - expected) ** 2 / expected).sum().item() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    ("depth", "num_draft_tokens", "settings"),
    [(1, 1, {"top_k": 0}), (1, 3, {"top_k": 0}), (2, 2, {"top_k": 5, "temperature": 1.5})],
)
def test_samples_have_the_target_distribution(depth, num_draft_tokens, settings):
    """4000 samples of four tokens against the exact probabilities of all sequences; the last three are drafted ones,
    replacements of refused ones, and what follows accepted ones."""
    size, length, samples = 8, 4, 4000
    model = drafting_model("v3", depth, vocab_size=size)
    model.lm_head.weight.data *= 0.5  # less sure of itself, so that all sequences occur
    prompt = torch.tensor([[3, 5, 4]])
    sequences = torch.tensor(list(itertools.product(range(size), repeat=length)))
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(sequences), -1), sequences], 1)).logits[:, 2:-1]
    logits = logits / settings.get("temperature", 1.0)
    if settings["top_k"]:
        logits = logits.masked_fill(logits < logits.topk(settings["top_k"]).values[..., -1:], float("-inf"))
    exact = logits.softmax(-1).gather(-1, sequences.unsqueeze(-1)).prod(1).flatten().view([size] * length)
    torch.testing.assert_close(exact.sum(), torch.tensor(1.0))

    torch.manual_seed(0)
    rows = prompt.expand(samples, -1)
    inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    output = draft(
        model, inputs, do_sample=True, max_new_tokens=length, num_draft_tokens=num_draft_tokens, top_p=1.0, **settings
    )
    found = torch.zeros_like(exact)
    found.index_put_(tuple(output.sequences[:, 3:].T), torch.ones(samples), accumulate=True)
    for pair in itertools.combinations(range(length), 2):
        others = [axis for axis in range(length) if axis not in pair]
        assert chi_square_excess(found.sum(others).flatten(), exact.sum(others).flatten()) < 5, pair
    # That the test can fail: the drafts' own distribution is another.
    accepted_only = found.new_zeros(size).index_add_(0, output.sequences[:, 3], torch.ones(samples))
    assert chi_square_excess(accepted_only, exact.sum((0, 1, 2))) > 5


def test_rejection_sampling_of_one_draft():
    """Drafts drawn from q come out distributed as p, for p and q far apart and with zeros in both."""
    torch.manual_seed(0)
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.1, 0.0, 0.6, 0.3])
    samples = 20000
    tokens = torch.multinomial(q, samples, replacement=True).unsqueeze(1)
    scores = torch.stack([p, torch.tensor([0.0, 0.0, 0.0, 1.0])]).log().expand(samples, 2, 4)
    output, accepted = accept_sampled(Draft(tokens, q.expand(samples, 1, 4)), scores)
    assert chi_square_excess(output[:, 0].bincount(minlength=4).float(), p) < 5
    assert accepted.float().mean().item() == pytest.approx(torch.minimum(p, q).sum().item(), abs=0.02)  # 6 deviations
    assert (output[accepted == 1, 1] == 3).all()


class NoDoubles(LogitsProcessor):
    """Forbids a token to come again within four tokens. Reads its row's own past and length."""

    def __call__(self, input_ids, scores):
        scores.scatter_(1, input_ids[:, -4:], float("-inf"))  # in place, as processors may
        scores[:, input_ids.shape[1] % VOCABULARY] -= 3.0
        return scores


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 15, "eos_token_id": list(range(20, 40)), "pad_token_id": 0},
        {"logits_processor": [NoDoubles()]},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(3 + 5 * row, 15 + 5 * row + len(ids)))},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_logits_processors(batch, settings):
    model = drafting_model("v3", 2)
    expected = generate(model, batch, **settings).sequences
    assert expected.tolist() != generate(model, batch).sequences.tolist()
    assert draft(model, batch, num_draft_tokens=3, **settings).sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_end_at_an_end_of_sequence_token(batch):
    model = drafting_model("v3", 1)
    free = generate(model, batch).sequences[:, 9:]
    ends = set()
    for token in list(dict.fromkeys(free.flatten().tolist()))[::3]:
        expected = generate(model, batch, eos_token_id=token).sequences
        output = generate(model, batch, eos_token_id=token, use_mtp=True, num_draft_tokens=4)
        assert output.sequences.tolist() == expected.tolist()
        ends |= {row.index(token) for row in expected[:, 9:].tolist() if token in row}
    assert len(ends) > 3  # in the middle of drafts and elsewhere


class StopAfter(StoppingCriteria):
    """Ends the first row at `length` tokens, the second three later, and so on."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.length + 3 * torch.arange(len(input_ids))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("eos_token_id", [None, 3])
def test_stopping_criteria(batch, eos_token_id):
    model = drafting_model("v3", 1)
    ends = set()
    for length in (11, 12, 13, 16):
        settings = {"stopping_criteria": [StopAfter(length)], "eos_token_id": eos_token_id}
        expected = generate(model, batch, **settings)
        output = generate(model, batch, use_mtp=True, num_draft_tokens=4, **settings)
        assert output.sequences.tolist() == expected.sequences.tolist()
        assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
        ends.add(expected.sequences.shape[1])
    assert len(ends) == 4


class Recorder(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        self.values.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("eos", [False, True])
def test_a_streamer_sees_what_it_sees_of_plain_decoding(batch, eos):
    model = drafting_model("v3", 2)
    eos_token_id = late_token(generate(model, batch).sequences[0, 9:]) if eos else None
    plain, speculative = Recorder(), Recorder()
    generate(model, batch, streamer=plain, eos_token_id=eos_token_id)
    draft(model, batch, streamer=speculative, eos_token_id=eos_token_id, num_draft_tokens=4)
    assert speculative.values == plain.values
    assert speculative.ended == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_scores_and_logits_of_every_step(batch):
    model = drafting_model("v3", 1)
    flags = {"output_scores": True, "output_logits": True, "repetition_penalty": 1.3}
    eos_token_id = late_token(generate(model, batch, repetition_penalty=1.3).sequences[0, 9:])
    plain = generate(model, batch, eos_token_id=eos_token_id, **flags)
    speculative = draft(model, batch, eos_token_id=eos_token_id, num_draft_tokens=3, **flags)
    assert len(speculative.scores) == len(speculative.logits) == len(plain.scores)
    for row in range(batch):
        new = plain.sequences[row, 9:].tolist()
        steps = new.index(eos_token_id) + 1 if eos_token_id in new else len(new)
        for name in ("scores", "logits"):
            for step, (ours, theirs) in enumerate(zip(speculative[name], plain[name], strict=True)):
                expected = theirs[row] if step < steps else torch.zeros(VOCABULARY)
                torch.testing.assert_close(ours[row], expected, **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_is_left_as_plain_decoding_leaves_it(family, batch):
    model = drafting_model(family, 1)
    plain = generate(model, batch).past_key_values
    speculative = draft(model, batch, num_draft_tokens=3).past_key_values
    real = prompts(batch)["attention_mask"].bool()
    real = nn.functional.pad(real, (0, NEW_TOKENS - 1), value=True)
    for ours, theirs in zip(speculative.layers, plain.layers, strict=False):
        for name in ("keys", "values"):
            one, other = getattr(ours, name).transpose(1, 2), getattr(theirs, name).transpose(1, 2)
            torch.testing.assert_close(one[real], other[real], **TOLERANCE)
    assert len(speculative.layers) == len(plain.layers) + 1
    assert speculative.layers[-1].get_seq_length() == speculative.get_seq_length()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("depth", [1, 2])
def test_resuming_from_a_cache(batch, depth):
    """Turn by turn, as in a chat: drafting, drafting on, a turn without, and drafting once more."""
    model = drafting_model("v3", depth)
    inputs, cache = prompts(batch), DynamicCache(config=model.config)
    for turn, use_mtp in enumerate([True, True, False, True]):
        expected = generate(model, inputs, max_new_tokens=8).sequences
        output = generate(model, inputs, max_new_tokens=8, use_mtp=use_mtp, past_key_values=cache)
        assert output.sequences.tolist() == expected.tolist()
        assert output.past_key_values is cache
        ids = torch.cat([expected, random_ids(batch, 3, seed=20 + turn)], dim=1)
        mask = nn.functional.pad(inputs["attention_mask"], (0, 11), value=1)
        inputs = {"input_ids": ids, "attention_mask": mask}


def test_drafts_of_a_resumed_row_are_those_of_an_uninterrupted_one():
    """The MTP layer's cache entries are taken up again: counted by what is accepted afterwards."""
    model = drafting_model("v3", 1)
    whole = draft(model, max_new_tokens=20)
    first = generate(model, max_new_tokens=8, use_mtp=True)
    ids = first.sequences
    rest = generate(
        model,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        max_new_tokens=12,
        use_mtp=True,
        past_key_values=first.past_key_values,
        output_logits=True,
    )
    assert rest.sequences.tolist() == whole.sequences.tolist()
    cached = rest.past_key_values.layers[-1].keys
    torch.testing.assert_close(cached, whole.past_key_values.layers[-1].keys, **TOLERANCE)


def test_only_the_new_tokens_may_be_given_with_a_cache():
    model = drafting_model("v3", 1)
    ids = random_ids(1, 12)
    expected = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).sequences
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
    inputs = {"input_ids": ids[:, 8:], "attention_mask": torch.ones_like(ids)}
    output = draft(model, inputs, past_key_values=cache)
    assert output.sequences.tolist() == expected[:, 8:].tolist()


def test_a_cache_that_holds_the_whole_prompt_is_refused():
    model = drafting_model("v3", 1)
    with torch.no_grad():
        cache = model(prompts(1)["input_ids"], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`past_key_values` holds 9 tokens, of a prompt of 9"):
        generate(model, use_mtp=True, past_key_values=cache)


@pytest.mark.parametrize("settings", [{"prefill_chunk_size": 4}, {"prefill_chunk_size": 1}], ids=str)
@pytest.mark.parametrize("depth", [1, 3])
def test_a_prompt_in_chunks(depth, settings):
    model = drafting_model("v3", depth)
    whole = draft(model, 3)
    chunked = draft(model, 3, **settings)
    assert chunked.sequences.tolist() == whole.sequences.tolist()
    assert chunked.statistics.accepted == whole.statistics.accepted


def test_an_embedded_prompt():
    model = drafting_model("v3", 2)
    inputs = prompts(3)
    expected = generate(model, inputs).sequences[:, 9:]
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    output = draft(model, {**embedded, "attention_mask": inputs["attention_mask"]})
    assert output.sequences.tolist() == expected.tolist()


def test_a_model_with_an_adapter_drafts():
    model = drafting_model("v3", 1)
    adapter = LoraConfig(r=2, target_modules=["kv_b_proj", "o_proj", "eh_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    tuned = get_peft_model(model, adapter)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data *= 0.1
    assert draft(tuned, 3).sequences.tolist() == generate(tuned, 3).sequences.tolist()


def test_a_generation_config_can_ask_for_it():
    model = drafting_model("v3", 1)
    expected = generate(model).sequences.tolist()
    model.generation_config.use_mtp = True
    model.generation_config.num_draft_tokens = 2
    output = generate(model)
    assert output.sequences.tolist() == expected
    assert output.statistics.drafted > output.statistics.main_forwards


def test_rows_of_a_cache_keep_to_their_own_lengths():
    cache = DynamicCache()
    entries = torch.arange(2 * 6.0).view(2, 1, 6, 1)
    cache.update(entries[:, :, :3], entries[:, :, :3], 0)
    rows = CacheRows(cache.layers, [3, 3], None)
    assert rows.mask(2, entries.device) is None
    cache.update(entries[:, :, 3:], -entries[:, :, 3:], 0)
    rows.keep([1, 3])
    assert rows.mask(1, entries.device).tolist() == [[True] * 4 + [False] * 2 + [True], [True] * 7]
    cache.update(100 + entries[:, :, :2], 100 + entries[:, :, :2], 0)
    rows.keep([2, 0])
    assert rows.lengths == [6, 6]
    assert cache.layers[0].keys[:, 0, :, 0].tolist() == [[0, 1, 2, 3, 100, 101], [6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({"num_nextn_predict_layers": 0}, {}, r"no MTP layer \(`num_nextn_predict_layers` is 0\)"),
        ({}, {"num_draft_tokens": 0}, "`num_draft_tokens` is 0; accepted: a whole number of at least 1"),
        ({}, {"num_draft_tokens": 2, "use_mtp": False}, "`num_draft_tokens` is 2 and `use_mtp` is not set"),
        ({}, {"use_cache": False}, "`use_cache` is False"),
        ({}, {"synced_gpus": True}, "`synced_gpus` is True"),
        ({}, {"cache_implementation": "static"}, "`past_key_values` is a StaticCache"),
        ({}, {"output_attentions": True}, "`output_attentions` is True"),
        ({}, {"prompt_lookup_num_tokens": 3}, "`prompt_lookup_num_tokens` is 3"),
    ],
)
def test_what_cannot_be_is_refused(fields, settings, message):
    model = small_model("v3", **{"num_nextn_predict_layers": 1, **fields})
    with pytest.raises(ValueError, match=message):
        generate(model, **{"use_mtp": True, **settings})
