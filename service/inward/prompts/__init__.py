"""Conversation → token ids. The one place where a template is applied, so that fitting and serving see the same bytes.

A prompt is rendered up to the point where the answer begins (the chat template with its generation prompt, or the part
of the format string before ``{response}``); the response follows as it is. Prompt and response are tokenised
*together*, as one text. Where the boundary falls inside a token of that text (possible only without a special token
between them), they are tokenised apart, which is also what a model that samples an answer sees.

Control tokens that somebody spells out in a prompt or a response are text. Only in what came rendered, that is with a
template applied to it already, are they what they say; ``Turns`` knows such texts.
"""

from inward.prompts.chat_template import DATE
from inward.prompts.grouping import DEFAULT_FORMAT, Prompts, Texts, Tokenizer
from inward.prompts.length_limit import Grouped
from inward.prompts.turns import Turns
from inward.types import Message, Prompt

__all__ = ["DATE", "DEFAULT_FORMAT", "Grouped", "Message", "Prompt", "Prompts", "Texts", "Tokenizer", "Turns"]
