"""What a chat template leaves out of a conversation without a word is refused by name."""

import pytest

from inward.errors import InvalidField, SetupError
from inward.prompts import Prompts
from support.tiny_tokenizer import tokenizer

KNOWN_ROLES = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') or (m['role'] == 'system' and loop.first) %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
)
"""Of Qwen, Phi-3 and others: what is not known is skipped."""
PARTS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Of SmolVLM, Idefics 3 and others that see images."""
USER, ASSISTANT = {"role": "user", "content": "How tall?"}, {"role": "assistant", "content": "115 metres."}


def prompts(template):
    tok = tokenizer()
    tok.chat_template = template
    return Prompts(tok, max_tokens=200)


@pytest.mark.parametrize(
    ("messages", "at"),
    [
        ([{"role": "developer", "content": "Be kind."}, USER], 0),
        ([USER, ASSISTANT, {"role": "tool", "content": "21 C"}], 2),
        ([USER, ASSISTANT, {"role": "system", "content": "Be brief."}, USER], 2),
        ([{"role": "system", "content": "Be kind."}, {"role": "developer", "content": "Be brief."}, USER], 1),
    ],
)
def test_a_turn_that_the_template_skips_is_refused_by_its_role(messages, at):
    with pytest.raises(InvalidField, match=f"leaves out .*'{messages[at]['role']}'") as caught:
        prompts(KNOWN_ROLES).render(messages)
    assert caught.value.param == f"messages.{at}.role"


def test_turns_that_it_writes_are_none_of_that():
    conversation = [{"role": "system", "content": ""}, USER, {"role": "assistant", "content": " <b>\n"}, USER]
    assert "How tall?" in prompts(KNOWN_ROLES).render(conversation)


def test_texts_reach_a_template_that_writes_parts_of_contents():
    found = prompts(PARTS)
    assert found.render([USER, ASSISTANT, USER]) == (
        "<|user|>How tall?<|end|><|assistant|>115 metres.<|end|><|user|>How tall?<|end|><|assistant|>"
    )
    assert found.turns.split(found.render("How tall?") + "Yes.<|end|>") == (found.render("How tall?"), "Yes.")


def test_a_template_that_writes_no_text_at_all_is_refused_when_loading():
    with pytest.raises(SetupError, match="--template"):
        prompts("{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% endfor %}")
