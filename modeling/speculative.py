"""Speculative decoding with the MTP layers as drafters: DeepSeek-V3 §2.2 and §5.4.3 (arXiv 2412.19437).

Shapes: B batch, T tokens, S cached tokens, H hidden, W vocabulary, D MTP layers, k drafted tokens.

A round of decoding: the MTP layers guess the next k tokens, then one forward of the main model over the last token and
the k guesses tells at every one of these k+1 positions what the main model itself would have said. The guesses up to
the first that it would not have made are kept, and its own token at that place (or after the last guess) comes free.
So a round gives between 1 and k+1 tokens, and always those that the main model alone would have given: its greedy
choices, or samples of its distribution (rejection sampling: Leviathan et al., arXiv 2211.17192, algorithm 1).

Who knows what. Say the main model has processed the tokens t0 … t3 and chosen t4, and D = 2:

    position        0     1     2     3
    main's state    h0    h1    h2    h3
    depth 0 reads   t1    t2    t3    t4    and drafts d1, a guess at t5
    depth 1 reads   t2    t3    t4    d1    and drafts d2, a guess at t6

Depth 0's cache is right whatever becomes of d1: it holds states and tokens that are settled. Depth k's last k entries
stand on guesses, so each round takes the last D-1 positions of all depths back and computes them anew from settled
tokens. For more than D drafts the last layer goes on with its own output in place of the main model's state: it reads
d2 at position 4, d3 at position 5, and so on; these entries are dropped once the round is over.

transformers' assisted decoding (read in 5.23) has the same structure for one row. Here the rows of a batch advance each
at its own pace: see `CacheRows`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from .latent_cache import LatentCacheLayer
from .projection import project


@dataclass
class GenerationStatistics:
    """What drafting brought, over all rows of a batch.

    - `generated`: tokens, of which each row's first comes from the prompt and no draft.
    - `drafted`, `accepted`: draft tokens, and how many of them the main model would have said too.
    - `rounds`: forwards of the main model after the prompt; `main_forwards` counts each once for every row that ran.
    - `drafting_seconds`, `main_seconds`: wall time in the MTP layers and in the rest of the rounds. On an accelerator,
      where work is queued, only their sum is exact.
    """

    generated: int = 0
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    main_forwards: int = 0
    drafting_seconds: float = 0.0
    main_seconds: float = 0.0
    rows: int = 1

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafts that were accepted; 0 without drafts."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that a row gains with a forward of the main model; plain decoding gains 1."""
        return (self.generated - self.rows) / self.main_forwards if self.main_forwards else 1.0

    @property
    def estimated_speed_up(self) -> float:
        """Over plain decoding, if its forward of one token takes as long as ours of k+1: `tokens_per_forward` less the
        time for drafting. Where a forward's time grows with its tokens, plain decoding is faster than that assumes."""
        total = self.drafting_seconds + self.main_seconds
        return self.tokens_per_forward * self.main_seconds / total if total else 1.0


@dataclass
class SpeculativeDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """transformers' output of `generate` and `statistics`. In `scores` and `logits`, [B, W] a step, a row that has
    ended holds zeros."""

    statistics: GenerationStatistics | None = None


class CacheRows:
    """Some layers of a cache in which every row of the batch has its own length.

    A cache layer appends for all rows at the same column. Where one row keeps more of what was appended than another,
    the kept entries are moved to the end of their own row, and what then lies between a row's end and the longest
    row's is hidden by the mask. So column i always holds the i-th token of its row, nothing is ever copied but a
    round's few entries, and when all rows have the same length there is nothing to do at all.
    """

    def __init__(self, layers: list[DynamicLayer], lengths: list[int], prompt_mask: torch.Tensor | None):
        """`lengths`: the rows' entries. `prompt_mask` [B, S]: False where a column of the prompt is padding."""
        self.layers = layers
        self.lengths = lengths
        self.prompt_mask = prompt_mask

    @property
    def width(self) -> int:
        """The longest row's length: the column where the next entries are appended."""
        return max(self.lengths)

    @property
    def ragged(self) -> bool:
        return min(self.lengths) < self.width

    def column_of_end(self, device: torch.device) -> torch.Tensor:
        """[B, 1]: each row's length."""
        return torch.tensor(self.lengths, device=device).unsqueeze(1)

    def mask(self, num_new: int, device: torch.device) -> torch.Tensor | None:
        """Mask [B, width + num_new] for attention by entries about to be appended; `None` where all is visible."""
        if self.prompt_mask is None and not self.ragged:
            return None
        columns = torch.arange(self.width + num_new, device=device)
        mask = (columns < self.column_of_end(device)) | (columns >= self.width)
        if self.prompt_mask is not None:
            length = min(self.prompt_mask.shape[1], self.width + num_new)
            mask[:, :length] &= self.prompt_mask[:, :length]
        return mask

    def keep(self, kept: list[int]) -> None:
        """Of the entries appended to all rows since the last `keep`, keeps the first `kept[b]` of row b."""
        if self.ragged and any(kept):
            for layer in self.layers:
                self._move_to_row_ends(layer, max(kept))
        self.lengths = [length + more for length, more in zip(self.lengths, kept, strict=True)]
        self._crop()

    def take_back(self, num_entries: int) -> None:
        """Removes the last entries of every row."""
        self.lengths = [length - num_entries for length in self.lengths]
        self._crop()

    def _crop(self) -> None:
        for layer in self.layers:
            layer.crop(self.width - layer.get_seq_length())

    def _move_to_row_ends(self, layer: DynamicLayer, count: int) -> None:
        rows = torch.arange(len(self.lengths), device=layer.keys.device).unsqueeze(1)
        columns = self.column_of_end(layer.keys.device) + torch.arange(count, device=layer.keys.device)
        for states in (layer.keys, layer.values):  # [B, heads, S, width], written in place
            appended = states[:, :, self.width : self.width + count].transpose(1, 2).clone()
            states[rows, :, columns] = appended


def by_length(lengths: list[int], rows: list[int], call: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """`call(length)` [B, ...] for each of the lengths that `rows` have; row b of the result is that of its length.

    transformers' logits processors and stopping criteria see token ids [B, length]: all rows at one length. They count
    it, so a row must be shown at its own.
    """
    output = None
    for length in {lengths[row] for row in rows}:
        result = call(length)
        if output is None:
            output = result  # right for the rows of this length, and the others follow
        else:
            same = [row for row in rows if lengths[row] == length]
            output[same] = result[same]
    return output


class Draft(NamedTuple):
    """`tokens` [B, k]; when sampling, the `probabilities` [B, k, W] that they were drawn from."""

    tokens: torch.Tensor
    probabilities: torch.Tensor | None = None

    @classmethod
    def of_nothing(cls, states: torch.Tensor) -> "Draft":
        """k = 0, for the rows of `states` [B, ...]."""
        return cls(states.new_empty(len(states), 0, dtype=torch.long))


class MultiTokenDrafter:
    """Runs the MTP layers in step with the main model and lets them guess.

    `choose(logits [B, W], i)` is what makes the i-th draft token of its logits: `(token [B], probabilities or None)`.
    """

    def __init__(self, model, cache: Cache, rows: CacheRows, shift: torch.Tensor, num_draft_tokens: int, choose):
        self.backbone, self.lm_head = model.model, model.lm_head
        self.layers = model.mtp_layers[:num_draft_tokens]
        self.cache = cache
        self.rows = rows
        self.shift = shift  # [B or 1, 1]: position of a column of `rows`, less the column
        self.choose = choose
        self.tail: tuple[torch.Tensor, torch.Tensor] | None = None  # states and embeddings of the last D-1 positions

    def run(
        self, layer, hidden_states: torch.Tensor, embeds: torch.Tensor, positions: torch.Tensor, shared: dict
    ) -> torch.Tensor:
        hidden_states, _, _ = layer(
            hidden_states, embeds, position_ids=positions, past_key_values=self.cache, use_cache=True, **shared
        )
        return hidden_states

    def inputs(self, embeds: torch.Tensor, num_cached: int) -> tuple[torch.Tensor, dict]:
        """Positions [B, T] and what layers share, for `embeds` [B, T, H] at the rows' ends, `num_cached` entries of
        this round's guessing between."""
        device, T = embeds.device, embeds.shape[1]
        positions = (
            self.rows.column_of_end(device) + self.shift + torch.arange(num_cached, num_cached + T, device=device)
        )
        mask = self.rows.mask(num_cached + T, device)
        return self.backbone.layer_inputs(embeds, mask, positions, self.cache, self.layers[-1].self_attn.layer_idx)

    def propose(self, hidden_states: torch.Tensor, embeds: torch.Tensor, kept: list[int], num_drafts: int) -> Draft:
        """Takes in what the main model has settled and guesses on.

        Args:
            hidden_states: [B, T, H], the main model's normed states at its new positions.
            embeds: [B, T, H], embeddings of the token after each of them.
            kept: how many of the T are row b's; what comes after them is of no meaning.
            num_drafts: how many tokens to guess; 0 only takes in.
        """
        redone = 0
        if self.tail is not None:
            redone = self.tail[0].shape[1]
            hidden_states = torch.cat([self.tail[0], hidden_states], dim=1)
            embeds = torch.cat([self.tail[1], embeds], dim=1)
            self.rows.take_back(redone)
        kept = [redone + count for count in kept]
        last = last_kept(kept, embeds)
        self.keep_tail(hidden_states, embeds, kept, last)

        tokens, probabilities = [], []
        positions, shared = self.inputs(embeds, 0)
        for depth, layer in enumerate(self.layers):
            hidden_states = self.run(layer, hidden_states, embeds, positions, shared)
            if depth >= num_drafts and layer is self.layers[-1]:
                break
            state = hidden_states[:, -1:] if last is None else hidden_states[last].unsqueeze(1)
            next_embed = self.guess(state, tokens, probabilities)
            embeds = torch.cat([embeds[:, 1:], next_embed], dim=1)
            if last is not None:
                embeds[last] = next_embed[:, 0]
        self.rows.keep(kept)

        for step in range(num_drafts - len(self.layers)):
            positions, shared = self.inputs(next_embed, step)
            state = self.run(layer, state, next_embed, positions, shared)
            next_embed = self.guess(state, tokens, probabilities)
        self.rows.keep([0] * len(kept))
        if num_drafts == 0:
            return Draft.of_nothing(embeds)
        tokens, probabilities = tokens[:num_drafts], probabilities[:num_drafts]
        return Draft(torch.stack(tokens, 1), None if probabilities[0] is None else torch.stack(probabilities, 1))

    def guess(self, state: torch.Tensor, tokens: list, probabilities: list) -> torch.Tensor:
        """Appends the next draft token; returns its embedding [B, 1, H]. `state` [B, 1, H] is an MTP layer's output."""
        token, distribution = self.choose(project(self.lm_head, state)[:, -1], tokens)
        tokens.append(token)
        probabilities.append(distribution)
        return self.backbone.embed_tokens(token.unsqueeze(1))

    def keep_tail(self, hidden_states: torch.Tensor, embeds: torch.Tensor, kept: list[int], last) -> None:
        """Remembers the last D-1 settled positions of each row, or as many as there are."""
        length = min(len(self.layers) - 1, *kept)
        if length <= 0:
            self.tail = None
        elif last is None:
            self.tail = hidden_states[:, -length:], embeds[:, -length:]
        else:
            rows, columns = last
            picked = rows.unsqueeze(1), columns.unsqueeze(1) + torch.arange(1 - length, 1, device=columns.device)
            self.tail = hidden_states[picked], embeds[picked]


def last_kept(kept: list[int], states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Index into `states` [B, T, ...] of each row's last kept entry; `None` where that is the last of all rows."""
    if min(kept) == states.shape[1]:
        return None
    columns = torch.tensor([max(count, 1) - 1 for count in kept], device=states.device)
    return torch.arange(len(kept), device=states.device), columns


def accept_greedy(draft: Draft, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`scores` [B, k+1, W] → the main model's choices [B, k+1], of which the first `accepted` + 1 hold; `accepted` [B]
    counts the drafts that are the same."""
    choices = scores.argmax(dim=-1)
    accepted = (choices[:, :-1] == draft.tokens).cumprod(dim=1).sum(dim=1)
    return choices, accepted


def accept_sampled(draft: Draft, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rejection sampling (arXiv 2211.17192, algorithm 1): as `accept_greedy`, but the tokens are samples.

    With p = softmax(scores), a draft x drawn with probability q(x) is accepted with probability min(1, p(x) / q(x)); in
    place of the first that is not, a token is drawn from what q left of p, max(0, p - q) renormalised.
    """
    p = scores.softmax(dim=-1)
    q = p[:, :0] if draft.probabilities is None else draft.probabilities
    of_drafts = draft.tokens.unsqueeze(-1)
    p_draft, q_draft = p[:, :-1].gather(-1, of_drafts).squeeze(-1), q.gather(-1, of_drafts).squeeze(-1)
    accepted = (torch.rand_like(q_draft) * q_draft < p_draft).cumprod(dim=1).sum(dim=1)
    rows = torch.arange(len(accepted), device=accepted.device)
    p_last = p[rows, accepted]
    left = (p_last - torch.nn.functional.pad(q, (0, 0, 0, 1))[rows, accepted]).clamp(min=0)
    left = torch.where(left.sum(dim=-1, keepdim=True) > 0, left, p_last)  # p = q, and a rejection by rounding alone
    tokens = torch.nn.functional.pad(draft.tokens, (0, 1))
    tokens[rows, accepted] = torch.multinomial(left, num_samples=1).squeeze(-1)
    return tokens, accepted


class SpeculativeDecoding:
    """One call of `generate(use_mtp=True)`: greedy decoding or sampling of B rows, left-padded or not.

    A row ends where plain decoding ends it. With an end-of-sequence token among the stopping criteria, rows that ended
    are filled up with padding; without one they go on until the last row ends, as in transformers' own loop.
    """

    def __init__(
        self,
        model,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
        model_kwargs: dict,
    ):
        self.model = model
        self.config = generation_config
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.streamer = streamer
        self.num_draft_tokens = check_arguments(model, generation_config, model_kwargs)

        B, self.prompt_length = input_ids.shape
        self.device = input_ids.device
        self.cache: Cache = model_kwargs["past_key_values"]
        self.inputs_embeds = model_kwargs.get("inputs_embeds")
        self.position_ids = model_kwargs["position_ids"]
        self.num_columns = self.position_ids.shape[1]  # of the prompt, what the cache holds of it included
        mask = model_kwargs.get("attention_mask")
        self.prompt_mask = None if mask is None else mask.bool()

        pad = generation_config._pad_token_tensor
        self.pad_token_id = 0 if pad is None else pad.item()
        self.pads_ended_rows = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self.max_length = generation_config.max_length
        # Room for drafts beyond the last token; what lies beyond `lengths` has no meaning.
        room = max(self.max_length, self.prompt_length + 1) + self.num_draft_tokens + 1
        self.sequences = input_ids.new_full((B, room), self.pad_token_id)
        self.sequences[:, : self.prompt_length] = input_ids
        self.lengths = [self.prompt_length] * B
        self.ended_at: list[int | None] = [None] * B
        self.streamed = self.prompt_length
        self.scores: list[torch.Tensor] | None = [] if self._wants("output_scores") else None
        self.raw_logits: list[torch.Tensor] | None = [] if self._wants("output_logits") else None
        self.statistics = GenerationStatistics(rows=B)

    def _wants(self, flag: str) -> bool:
        return bool(self.config.return_dict_in_generate and getattr(self.config, flag))

    def run(self) -> SpeculativeDecoderOnlyOutput | torch.LongTensor:
        hidden_states, embeds = self.prefill()
        kept = [hidden_states.shape[1]] * len(self.lengths)
        drafter, rows, statistics = self.drafter, self.rows, self.statistics
        while running := [row for row in range(len(self.lengths)) if self.is_running(row)]:
            start = time.perf_counter()
            room = self.max_length - 1 - min(self.lengths[row] for row in running)
            draft = drafter.propose(hidden_states, embeds, kept, min(self.num_draft_tokens, max(room, 0)))
            drafted = time.perf_counter()

            T = draft.tokens.shape[1] + 1
            ends = torch.tensor(self.lengths, device=self.device).unsqueeze(1)
            steps = torch.arange(T, device=self.device)
            self.sequences.scatter_(1, ends + steps[:-1], draft.tokens)
            inputs = self.sequences.gather(1, ends - 1 + steps)  # the last token and the drafts
            hidden_states = self.model.model(
                input_ids=inputs,
                attention_mask=rows.mask(T, self.device),
                position_ids=rows.column_of_end(self.device) + self.shift + steps,
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
            tokens, accepted = self.verify(draft, project(self.model.lm_head, hidden_states), ends + steps)
            kept = self.advance(tokens, accepted, running)
            rows.keep(kept)

            statistics.rounds += 1
            statistics.main_forwards += len(running)
            statistics.drafted += (T - 1) * len(running)
            n = max(kept)
            hidden_states, embeds = hidden_states[:, :n], self.model.model.embed_tokens(tokens[:, :n])
            statistics.drafting_seconds += drafted - start
            statistics.main_seconds += time.perf_counter() - drafted
        drafter.propose(hidden_states, embeds, kept, 0)  # leaves the MTP layers' cache in step with the main model's
        return self.finish()

    def prefill(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the main model over the prompt and chooses the first token; returns the states [B, T, H] of the last
        chunk of the prompt, and embeddings of the token after each."""
        past = self.cache.get_seq_length()
        if past >= self.num_columns:
            raise ValueError(
                f"`past_key_values` holds {past} tokens, of a prompt of {self.num_columns}; accepted: fewer, as the "
                "next token follows from the last of the prompt."
            )
        backbone = self.model.model
        if self.inputs_embeds is not None:
            embeds = self.inputs_embeds
        else:
            embeds = backbone.embed_tokens(self.sequences[:, : self.prompt_length])
        embeds = embeds[:, past - self.num_columns :]  # given whole, or without what the cache holds
        B, T = embeds.shape[:2]
        self.shift = self.position_ids[:, -1:] - (self.num_columns - 1)
        self.rows = CacheRows(self.cache.layers, [past] * B, self.prompt_mask)
        chunks = embeds.split(self.config.prefill_chunk_size or T, dim=1)
        begin = past
        for index, chunk in enumerate(chunks):
            end = begin + chunk.shape[1]
            hidden_states = backbone(
                inputs_embeds=chunk,
                attention_mask=None if self.prompt_mask is None else self.prompt_mask[:, :end],
                position_ids=self.position_ids[:, begin:end],
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
            if begin == past:
                self.prepare_layers(past)
            self.rows.lengths = [end] * B
            if index + 1 < len(chunks):
                following = torch.cat([chunk[:, 1:], chunks[index + 1][:, :1]], dim=1)
                self.drafter.propose(hidden_states, following, [chunk.shape[1]] * B, 0)
            begin = end

        logits = project(self.model.lm_head, hidden_states[:, -1:])
        steps = torch.tensor(self.lengths, device=self.device).unsqueeze(1)
        tokens, accepted = self.verify(Draft.of_nothing(logits), logits, steps)
        self.advance(tokens, accepted, list(range(B)))
        return hidden_states, torch.cat([chunk[:, 1:], backbone.embed_tokens(tokens)], dim=1)

    def prepare_layers(self, past: int) -> None:
        """Gives the MTP layers their places in the cache, after the main model's. What they hold there is of use if it
        is of the same tokens as the main model's; otherwise they begin with this call's."""
        num_main = self.model.config.num_hidden_layers
        kind = type(self.cache.layers[0])
        if kind not in (DynamicLayer, LatentCacheLayer) or self.cache.offloading:
            offloaded = " (offloaded)" if self.cache.offloading else ""
            raise ValueError(
                f"`past_key_values` has layers of type {kind.__name__}{offloaded}; accepted with `use_mtp=True`: a "
                "`DynamicCache` that stays in memory."
            )
        used = num_main + min(self.num_draft_tokens, len(self.model.mtp_layers))
        self.cache.layers += [kind() for _ in range(used - len(self.cache.layers))]
        self.rows.layers, layers = self.cache.layers[:num_main], self.cache.layers[num_main:used]
        offset = 0
        if any(layer.get_seq_length() != past for layer in layers):
            offset = past
            for layer in layers:
                layer.reset()
        mask = None if self.prompt_mask is None else self.prompt_mask[:, offset:]
        rows = CacheRows(layers, [past - offset] * len(self.lengths), mask)
        self.drafter = MultiTokenDrafter(
            self.model, self.cache, rows, self.shift + offset, self.num_draft_tokens, self.choose_draft
        )

    def process(self, lengths: list[int], logits: torch.Tensor) -> torch.Tensor:
        """Logits [B, W] after the logits processors, float32. Row b is at `lengths[b]` tokens."""
        if len(self.logits_processor) == 0:
            return logits
        rows = list(range(len(lengths)))
        return by_length(
            lengths, rows, lambda length: self.logits_processor(self.sequences[:, :length], logits.clone())
        )

    def choose_draft(
        self, logits: torch.Tensor, tokens: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The draft token after `tokens`, from `logits` [B, W]: by the same rules as the main model's tokens."""
        if len(self.logits_processor):
            ends = torch.tensor(self.lengths, device=self.device)
            if tokens:
                self.sequences.scatter_(1, (ends + len(tokens) - 1).unsqueeze(1), tokens[-1].unsqueeze(1))
            logits = self.process([length + len(tokens) for length in self.lengths], logits.float())
        if not self.config.do_sample:
            return logits.argmax(dim=-1), None
        probabilities = logits.softmax(dim=-1, dtype=torch.float32)
        return torch.multinomial(probabilities, num_samples=1).squeeze(-1), probabilities

    def verify(self, draft: Draft, logits: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, k+1] by the main model's `logits` [B, k+1, W], and how many drafts are accepted [B]. Writes the
        tokens to `sequences` at `columns` [B, k+1]."""
        logits = logits.float()
        scores = logits
        if len(self.logits_processor):
            at = [self.process([n + i for n in self.lengths], logits[:, i]) for i in range(logits.shape[1])]
            scores = torch.stack(at, dim=1)
        tokens, accepted = (accept_sampled if self.config.do_sample else accept_greedy)(draft, scores)
        self.sequences.scatter_(1, columns, tokens)
        for kept, new in ((self.scores, scores), (self.raw_logits, logits)):
            if kept is not None:
                self._record(kept, new)
        return tokens, accepted

    def _record(self, steps: list[torch.Tensor], new: torch.Tensor) -> None:
        """Puts `new` [B, k+1, W] where each row stands among `steps`, [B, W] each. What is not accepted after all is
        overwritten by the next round, or cut off in the end."""
        for row, length in enumerate(self.lengths):
            for i in range(new.shape[1] if self.is_running(row) else 0):
                step = length - self.prompt_length + i
                if step == len(steps):
                    steps.append(torch.zeros_like(new[:, 0]))
                steps[step][row] = new[row, i]

    def advance(self, tokens: torch.Tensor, accepted: torch.Tensor, running: list[int]) -> list[int]:
        """Moves the `running` rows on by what was accepted and the token after it, up to where a row ends; returns by
        how many tokens."""
        gained = [0] * len(self.lengths)
        offered = [count + 1 for count in accepted.tolist()]  # here the host waits for the device, once a round
        limits = [min(count, self.max_length - length) for count, length in zip(offered, self.lengths, strict=True)]
        growing = running
        while growing := [row for row in growing if gained[row] < limits[row]]:
            for row in growing:
                gained[row] += 1
            at = [length + gain for length, gain in zip(self.lengths, gained, strict=True)]
            stop = by_length(at, growing, self._stop).tolist()
            for row in growing:
                if stop[row]:
                    self.ended_at[row] = self.ended_at[row] or at[row]
                    if self.pads_ended_rows:
                        limits[row] = gained[row]
        for row in running:
            self.lengths[row] += gained[row]
            self.statistics.generated += gained[row]
            self.statistics.accepted += gained[row] - 1
        self.stream()
        return gained

    def _stop(self, length: int) -> torch.Tensor:
        """[B]: which rows the stopping criteria end at `length` tokens."""
        scores = None if self.scores is None else tuple(self.scores[: length - self.prompt_length])
        return self.stopping_criteria(self.sequences[:, :length], scores)

    def is_running(self, row: int) -> bool:
        if self.ended_at[row] is None:
            return True
        goes_on = None in self.ended_at or self.lengths[row] < max(self.ended_at)
        return not self.pads_ended_rows and goes_on and self.lengths[row] < self.max_length

    def stream(self) -> None:
        """Hands the streamer, step by step as plain decoding does, the tokens [B] that all rows have."""
        if self.streamer is None:
            return
        running = [self.lengths[row] for row in range(len(self.lengths)) if self.is_running(row)]
        settled = min(running) if running else max(self.ended_at)
        for column in range(self.streamed, settled):
            step = self.sequences[:, column].tolist()
            ended = [self.pads_ended_rows and column >= length for length in self.lengths]
            step = [self.pad_token_id if over else token for token, over in zip(step, ended, strict=True)]
            self.streamer.put(torch.tensor(step))
        self.streamed = max(self.streamed, settled)

    def finish(self) -> SpeculativeDecoderOnlyOutput | torch.LongTensor:
        length = max(self.ended_at)
        sequences = self.sequences[:, :length].clone()
        if self.pads_ended_rows:
            ends = torch.tensor(self.lengths, device=self.device).unsqueeze(1)
            sequences[torch.arange(length, device=self.device) >= ends] = self.pad_token_id
        for recorded in (self.scores, self.raw_logits):
            for row, row_length in enumerate(self.lengths if recorded else []):
                for step in recorded[row_length - self.prompt_length :]:
                    step[row] = 0
        surplus = max(self.lengths) - length  # rows that had run ahead of where the last one ended
        if surplus:
            self.cache.crop(-surplus)
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return sequences
        steps = length - self.prompt_length
        return SpeculativeDecoderOnlyOutput(
            sequences=sequences,
            scores=None if self.scores is None else tuple(self.scores[:steps]),
            logits=None if self.raw_logits is None else tuple(self.raw_logits[:steps]),
            past_key_values=self.cache,
            statistics=self.statistics,
        )


def check_arguments(model, generation_config: GenerationConfig, model_kwargs: dict) -> int:
    """The number of tokens to draft a round: `num_draft_tokens`, or one an MTP layer.

    Raises:
        ValueError: the model has no MTP layer, or `generate` was asked for something that does not go with drafting.
    """
    depth = len(model.mtp_layers)
    if depth == 0:
        raise ValueError(
            "`use_mtp` is True and the model has no MTP layer (`num_nextn_predict_layers` is 0); accepted: a "
            "checkpoint that holds MTP layers, loaded with them, or `use_mtp=False`."
        )
    num_draft_tokens = getattr(generation_config, "num_draft_tokens", None)
    if num_draft_tokens is None:
        num_draft_tokens = depth
    if type(num_draft_tokens) is not int or num_draft_tokens < 1:
        raise ValueError(f"`num_draft_tokens` is {num_draft_tokens!r}; accepted: a whole number of at least 1.")
    if not model_kwargs["use_cache"]:
        raise ValueError("`use_cache` is False; accepted with `use_mtp=True`: True.")
    if model_kwargs["past_key_values"].is_compileable:
        raise ValueError(
            f"`past_key_values` is a {type(model_kwargs['past_key_values']).__name__}; accepted with `use_mtp=True`: a "
            "`DynamicCache`."
        )
    if model_kwargs.pop("synced_gpus", False):
        raise ValueError(
            "`synced_gpus` is True, as it is by default where ranks share a model's weights (ZeRO-3, FSDP); accepted "
            "with `use_mtp=True`: False, for ranks that each hold the whole model."
        )
    for field in ("output_attentions", "output_hidden_states", "prompt_lookup_num_tokens", "assistant_early_exit"):
        if value := getattr(generation_config, field):
            raise ValueError(f"`{field}` is {value!r}; accepted with `use_mtp=True`: unset.")
    return num_draft_tokens
