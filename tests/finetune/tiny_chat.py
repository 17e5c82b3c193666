"""A chat format in DeepSeek's manner, and conversations."""

import json
from pathlib import Path

BOS, EOS, PAD, USER, ASSISTANT = "<bos>", "<eos>", "<pad>", "<user>", "<assistant>"
# DeepSeek-V3's layout: the system text, then the turns; the end token after each answer. MARK is where the
# {% generation %} tags go, which DeepSeek's own templates lack.
TEMPLATE = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] }}"
    "{%- elif message['role'] == 'user' -%}{{ '<user>' + message['content'] }}"
    "{%- else -%}{{ '<assistant>' }}MARK{{ message['content'] + eos_token }}ENDMARK{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}"
)
MARKED = TEMPLATE.replace("ENDMARK", "{%- endgeneration -%}").replace("MARK", "{%- generation -%}")
UNMARKED = TEMPLATE.replace("ENDMARK", "").replace("MARK", "")


def conversation(first: int, second: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"What is {first} plus {second}?"},
        {"role": "assistant", "content": f"{first} plus {second} is {first + second}."},
    ]


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
