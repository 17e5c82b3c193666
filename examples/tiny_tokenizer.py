"""A small byte-level BPE tokenizer with DeepSeek's special tokens and chat template, merged on Python source."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"

# DeepSeek-V3's layout: the system text first, no separators, the end-of-sentence token after each answer only.
# `{% generation %}` marks what the assistant says, for `return_assistant_tokens_mask`; the end token belongs to it.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages if message['role'] == 'system' -%}{{ message['content'] }}{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<｜User｜>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}{{ '<｜Assistant｜>' }}"
    "{%- generation -%}{{ message['content'] + eos_token }}{%- endgeneration -%}"
    "{%- elif message['role'] != 'system' -%}"
    "{{ raise_exception('role must be system, user or assistant, not ' + message['role']) }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<｜Assistant｜>' }}{%- endif -%}"
)

# What may become one token, in order of preference. Digits come in groups of at most three, as in DeepSeek's own.
PIECES = (
    r"\s*\n *",  # a line break with the blank lines before and the indentation after it
    r" ?_*\p{L}+(?:__)?",  # "get", "_value" of get_value; all of __init__
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}_]+",  # "):", " =="
    r"_+",
    r"\s+(?!\S)|\s+",  # spaces inside a line, less the one that the next word takes
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Learns the merges from `texts`. The result is the same for the same texts in the same order.

    As with DeepSeek's tokenizers, a call puts the beginning-of-sentence token first. The chat template writes it
    itself, so tokenise its text with `add_special_tokens=False`; `apply_chat_template(tokenize=True)` does.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(PIECES)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = [BOS, EOS, PAD, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: no text is out of vocabulary
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
