"""Drafting with the MTP layers against plain decoding with the same model, and what training them takes in memory.

The "transformers" column is empty here: what is compared with, in `ratio`, is this package's own plain decoding, or the
unchunked loss. transformers drafts with DeepSeek-V3's shape alone (61 layers, one MTP layer), for one row.
"""

import time
from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from measuring import alternate
from models import ALL_LAYERS, CUT_VOCABULARY, V2_LITE, VOCABULARY
from results import Result, Setup, Target
from tiny import held_out_beginnings, tiny_model
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from deepseek_hf.configuration import DeepseekV2Config
from deepseek_hf.modeling import DeepseekV2ForCausalLM
from deepseek_hf.modeling.speculative import Draft, GenerationStatistics, SpeculativeDecoding

FILES, PROMPT, NEW_TOKENS, REPETITIONS = 8, 128, 128, 3
TOKENS_PER_FORWARD, FASTER = 1.5, 1.0  # targets, on the tiny model
LAYERS, V2_LITE_PROMPT, V2_LITE_TOKENS = 4, 256, 32
BATCHES, ACCEPTANCES = (1, 4, 8), (0.5, 0.7, 0.9)
LOSS_TOKENS, LOSS_LAYERS, DEPTHS, MEMORY_TARGET = 4096, 1, (0, 1, 2), 0.5


class Stopwatch(BaseStreamer):
    """Seconds from the first new token to the end: decoding without the prompt."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        self.seconds = time.perf_counter() - self.times[1]  # the first is the prompt


def decode(
    model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, num_draft_tokens: int | None
) -> tuple[float, torch.Tensor, GenerationStatistics | None]:
    """Seconds for greedy decoding after the first token, the tokens, and with drafts their statistics."""
    watch = Stopwatch()
    drafting = {} if num_draft_tokens is None else {"use_mtp": True, "num_draft_tokens": num_draft_tokens}
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        streamer=watch,
        return_dict_in_generate=True,
        **drafting,
    )
    return watch.seconds, output.sequences, output.get("statistics")


def run_tiny(setup: Setup) -> Iterator[Result]:
    """The tiny pretrained model on code that it has not seen: acceptance, tokens a forward, speed."""
    model, prompts = tiny_model(setup), held_out_beginnings(setup, FILES, PROMPT)
    named = {"row": "drafting-tiny", "layers": model.config.num_hidden_layers}
    decode(model, prompts[0], 8, None)
    for num_draft_tokens in (1, 2, 3):
        total, seconds = GenerationStatistics(rows=len(prompts)), {None: 0.0, num_draft_tokens: 0.0}
        for prompt in prompts:
            times = {None: [], num_draft_tokens: []}
            for _ in range(setup.repetitions or REPETITIONS):
                (plain, tokens, _), (drafted, same, statistics) = (decode(model, prompt, NEW_TOKENS, k) for k in times)
                if setup.dtype == torch.float32 and not torch.equal(tokens, same):
                    raise AssertionError("drafting, tiny model: other tokens than by plain decoding")
                times[None].append(plain)
                times[num_draft_tokens].append(drafted)
            for k, values in times.items():
                seconds[k] += median(values)
            for name in ("generated", "drafted", "accepted", "main_forwards"):
                setattr(total, name, getattr(total, name) + getattr(statistics, name))
        gained = len(prompts) * (NEW_TOKENS - 1)
        case = f"{num_draft_tokens} drafted a round, {len(prompts)} held-out files"
        yield Result(
            **named,
            case=f"{case}, tokens a forward",
            unit="tokens",
            ours=total.tokens_per_forward,
            theirs=None,
            ratio=total.tokens_per_forward,
            target=Target(TOKENS_PER_FORWARD) if num_draft_tokens == 1 else None,
            note=f"acceptance {total.acceptance_rate:.0%}; plain decoding gains 1 a forward",
        )
        yield Result(
            **named,
            case=case,
            unit="tok/s",
            ours=gained / seconds[num_draft_tokens],
            ratio=seconds[None] / seconds[num_draft_tokens],
            target=Target(FASTER) if num_draft_tokens == 1 else None,
            note=f"ratio to plain decoding, {gained / seconds[None]:.1f} tok/s",
        )


class SimulatedDecoding(SpeculativeDecoding):
    """Accepts a draft with probability `model.acceptance`, whatever it says: random weights would never agree."""

    def verify(self, draft: Draft, logits: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, _ = super().verify(draft, logits, columns)
        lucky = torch.rand(draft.tokens.shape, device=tokens.device) < self.model.acceptance
        tokens = torch.cat([draft.tokens, tokens[:, -1:]], dim=1)
        self.sequences.scatter_(1, columns, tokens)
        return tokens, lucky.long().cumprod(dim=1).sum(dim=1)


class SimulatedModel(DeepseekV2ForCausalLM):
    """A model whose drafts are accepted by lot."""

    acceptance: float

    def _assisted_decoding(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        streamer = kwargs.pop("streamer")
        return SimulatedDecoding(
            self, input_ids, logits_processor, stopping_criteria, generation_config, streamer, kwargs
        ).run()


def v2_lite(setup: Setup, layers: int, **fields) -> SimulatedModel:
    """DeepSeek-V2-Lite's layers with random weights."""
    vocabulary = VOCABULARY if layers == ALL_LAYERS else CUT_VOCABULARY
    fields = {**V2_LITE, "num_hidden_layers": layers, "vocab_size": vocabulary, **fields}
    torch.manual_seed(0)
    with setup.device:
        return SimulatedModel._from_config(DeepseekV2Config(**fields), dtype=setup.dtype)


def run_v2_lite(setup: Setup) -> Iterator[Result]:
    """Batches 1, 4 and 8 at simulated acceptances, and from which acceptance on drafting pays."""
    layers = setup.layers or LAYERS
    model = v2_lite(setup, layers, num_nextn_predict_layers=1).eval()
    for batch in BATCHES:
        prompt = torch.randint(model.config.vocab_size, (batch, V2_LITE_PROMPT), device=setup.device)
        model.acceptance = 0.5
        decode(model, prompt, 4, 1)
        times: dict[float | None, list[float]] = {rate: [] for rate in (None, *ACCEPTANCES)}
        for _ in range(setup.repetitions or REPETITIONS):
            for rate, seconds in times.items():
                model.acceptance = rate
                took, _, statistics = decode(model, prompt, V2_LITE_TOKENS, None if rate is None else 1)
                # Rows end at their own pace; a round costs all of them the same, so it is rounds that are timed.
                if rate is None:
                    seconds.append(took / (V2_LITE_TOKENS - 1))
                else:
                    seconds.append((statistics.drafting_seconds + statistics.main_seconds) / statistics.rounds)
        step = median(times[None])
        for rate in ACCEPTANCES:
            per_round = median(times[rate])
            yield Result(
                row="drafting",
                case=f"batch {batch}, acceptance {rate:.0%}",
                unit="tok/s",
                layers=layers,
                ours=batch * (1 + rate) / per_round,
                ratio=(1 + rate) * step / per_round,
                note=f"ratio to plain decoding, {batch / step:.1f} tok/s",
            )
        cost = median([median(times[rate]) for rate in ACCEPTANCES]) / step
        yield Result(
            row="drafting",
            case=f"batch {batch}, break-even acceptance",
            unit="share of drafts",
            layers=layers,
            ours=cost - 1,
            note=f"a round of one draft takes {cost:.2f} plain steps; the MTP layer is one more to {layers} layers",
        )


def naive_loss(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """The joint loss from the logits of all positions and heads."""
    output = model(tokens, output_mtp_logits=True, use_cache=False)
    heads = [(output.logits, 1), *((logits, depth + 2) for depth, logits in enumerate(output.mtp_logits or ()))]
    losses = [F.cross_entropy(head[0, : tokens.shape[1] - ahead].float(), tokens[0, ahead:]) for head, ahead in heads]
    loss, further = losses[0], losses[1:]
    return loss + model.config.mtp_loss_weight * torch.stack(further).mean() if further else loss


def chunked_loss(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, labels=tokens, output_logits=False, use_cache=False).loss


def training_step(loss_of, model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss = loss_of(model, tokens)
    loss.backward()
    return loss.detach()


def run_loss(setup: Setup) -> Iterator[Result]:
    """Peak memory of a training step with D MTP layers and the whole vocabulary; embedding and head are frozen. The
    layers are narrow and dense: the logits' memory, which is what counts, does not depend on them."""
    for depth in DEPTHS:
        layers = setup.layers or LOSS_LAYERS
        narrow = {"hidden_size": 256, "intermediate_size": 1024, "n_routed_experts": None, "n_shared_experts": None}
        model = v2_lite(setup, layers, num_nextn_predict_layers=depth, vocab_size=VOCABULARY, **narrow).train()
        model.get_input_embeddings().requires_grad_(False)
        model.lm_head.requires_grad_(False)
        tokens = torch.randint(VOCABULARY, (1, LOSS_TOKENS), device=setup.device)
        ours, naive = (partial(training_step, loss, model, tokens) for loss in (chunked_loss, naive_loss))
        difference = abs(ours().item() / naive().item() - 1)
        if difference > 1e-2:
            raise AssertionError(f"chunked and naive loss differ by {difference:.1e}")
        chunked_way, naive_way, limits = alternate(ours, naive, setup.repetitions or 1, setup.machine)
        yield Result(
            row="mtp-loss",
            case=f"D = {depth}, {LOSS_TOKENS} tokens, {VOCABULARY} words, extra memory",
            unit="GB",
            layers=layers,
            ours=chunked_way.extra_bytes / 1e9,
            ratio=chunked_way.extra_bytes / naive_way.extra_bytes,
            target=Target(MEMORY_TARGET, at_most=True),
            limits=limits,
            difference=difference,
            note=f"ratio to the logits of all positions at once, {naive_way.extra_bytes / 1e9:.1f} GB; a step takes "
            f"{chunked_way.seconds / naive_way.seconds:.2f} of their time",
        )
        del model
