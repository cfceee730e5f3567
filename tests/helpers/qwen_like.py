"""A tokenizer and a chat template that behave as Qwen3's do, in our own words.

The tokenizer joins line breaks into one token, also those of a turn's header with those that an
answer begins with. The template shows thinking only behind the last question.
"""

import re
from pathlib import Path

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# One token each, which a model may say.
SAID = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
# https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/tokenizer.json
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "yes no user assistant system answer\n",
    "a\n\nb",
    "a\n\n\nb\n\n\n\nc",
    "  two   three",
] * 8

TEMPLATE = """\
{%- set asked = namespace(last=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{%- set asked.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- set has_system = messages[0].role == 'system' %}
{%- if tools or has_system %}
{{- '<|im_start|>system\\n' }}
{%- if has_system %}{{- messages[0].content }}{%- endif %}
{%- if tools %}
{%- if has_system %}{{- '\\n\\n' }}{%- endif %}
{{- '# Tools\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set found = namespace(thought=m.reasoning_content or '', said=m.content) %}
{%- if not found.thought and '</think>' in m.content %}
{%- set found.thought = m.content.split('</think>')[0].split('<think>')[-1] %}
{%- set found.said = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}
{%- if loop.index0 > asked.last and (loop.last or found.thought) %}
{{- '<think>\\n' + found.thought.strip('\\n') + '\\n</think>\\n\\n' + found.said.lstrip('\\n') }}
{%- else %}
{{- found.said }}
{%- endif %}
{%- for call in m.tool_calls or [] %}
{%- if found.said or not loop.first %}{{- '\\n' }}{%- endif %}
{%- set given = call.function.arguments %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (given if given is string else given | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- elif m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- elif not (loop.first and has_system) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""

# As Qwen publishes it: without a mark.
UNMARKED = re.sub(r"\{%-? (end)?generation %\}\n", "", TEMPLATE)


def write_tokenizer(path: Path, template: str = TEMPLATE, *, trim_offsets: bool = False) -> Path:
    """Write a tokenizer with a template.

    Args:
        path: Its directory.
        template: Of chats.
        trim_offsets: Whether tokens are said to begin behind their white space, as some are.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(SAID)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = template
    fast.save_pretrained(path)
    return path
