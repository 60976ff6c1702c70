"""Chat templates in the style of well-known families, each with a small tokenizer that has its control tokens."""

from __future__ import annotations

from dataclasses import dataclass

from inward.backbones.tokenizer import FolderTokenizer
from support.tiny_tokenizer import byte_level, saved

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set start = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set start = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% set content = start + m['content'] if loop.first else m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}"
    "{% else %}{% set today = '26 Jul 2024' %}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + today + '\n\n' + system + '<|eot_id|>' }}"
    "{% for m in turns %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
QWEN_3 = (  # the last answer has its thoughts, if only empty ones; what is to be generated opens none
    "{% for m in messages %}{% set said = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ said + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (  # generation begins with a thought; what was thought is no part of the history
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template, the control tokens of its tokenizer, and those that end a text beside the tokenizer's EOS."""

    template: str
    eos: str
    control: tuple[str, ...] = ()
    bos: str | None = None
    adds_bos: bool = False
    pad: str | None = None
    ends: tuple[str, ...] = ()
    system: bool = True


HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "llama-2": Family(LLAMA_2, "</s>", bos="<s>", adds_bos=True),
    "llama-3": Family(
        LLAMA_3, "<|eot_id|>", HEADERS, bos="<|begin_of_text|>", adds_bos=True, pad="<|pad|>",
        ends=("<|end_of_text|>", "<|eom_id|>"),
    ),
    "qwen-2.5": Family(WITH_DEFAULT_SYSTEM, "<|im_end|>", IM, pad="<|endoftext|>", ends=("<|endoftext|>",)),
    "qwen-3": Family(QWEN_3, "<|im_end|>", IM, pad="<|endoftext|>", ends=("<|endoftext|>",)),
    "gemma": Family(
        GEMMA, "<eos>", ("<start_of_turn>",), bos="<bos>", adds_bos=True, pad="<pad>", ends=("<end_of_turn>",),
        system=False,
    ),
    "phi-3": Family(  # a mark that begins a turn may end a text, in GLM's configuration the user's too
        PHI_3, "<|endoftext|>", ("<|system|>",), ends=("<|end|>", "<|assistant|>", "<|user|>"),
    ),
    "mistral": Family(MISTRAL, "</s>", ("[INST]", "[/INST]"), bos="<s>", adds_bos=True, pad="<pad>", system=False),
    "chatml": Family(CHATML, "</s>", IM, pad="<pad>"),  # whose turns do not end in its EOS
    "smollm2": Family(WITH_DEFAULT_SYSTEM, "<|im_end|>", bos="<|im_start|>", pad="<|im_end|>"),
    "thinking": Family(THINKING, "<|end|>", ("<|user|>", "<|assistant|>"), bos="<|begin|>", adds_bos=True),
}  # fmt: skip


def tokenizer_of(name: str) -> FolderTokenizer:
    """A byte-level BPE with the family's control tokens and template."""
    family = FAMILIES[name]
    named = {name: token for name, token in (("bos_token", family.bos), ("pad_token", family.pad)) if token}
    special = list(dict.fromkeys([*named.values(), family.eos, *family.ends, *family.control]))
    backend = byte_level(special, 450, bos=family.bos if family.adds_bos else None)
    return saved(backend, eos_token=family.eos, chat_template=family.template, **named)


def end_ids_of(name: str) -> tuple[int, ...]:
    """The ids that end a text of the family, as its configurations would state them."""
    family = FAMILIES[name]
    ids = {token.content: i for i, token in tokenizer_of(name).added_tokens_decoder.items()}
    return tuple(ids[token] for token in (family.eos, *family.ends))
