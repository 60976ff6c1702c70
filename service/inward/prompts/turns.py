"""Texts to which a chat template was applied elsewhere: where their answer begins, and what belongs to neither part."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None


CONTROL = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
"""What looks like a control token, whether the tokenizer knows it as one or not."""
SYSTEM, QUESTION, ANSWER = "szx1", "qzx2", "azx3"
Apply = Callable[..., str]
"""The chat template: messages, and ``answer_next``."""


@dataclass(frozen=True, slots=True)
class Turns:
    """What a chat template writes around the turns of a conversation, by which texts to which it was applied are known.

    Trainers send such texts: decoded with special tokens, ended by whatever ended the answer, padded on either side;
    rendered with a generation prompt and an answer behind it, or whole, which is not the same in every template.
    """

    bos: str
    """What the template itself writes first of all, if it is the tokenizer's BOS."""
    any_bos: str
    begins: tuple[str, ...]
    """With what a conversation begins, after the BOS."""
    turn_end: str
    """Control token that ends a user's turn."""
    openings: tuple[tuple[re.Pattern[str], str], ...]
    """What stands before an answer, and what stands there when it is still to be written."""
    unasked: tuple[re.Pattern[str], str] | None
    """What ends a prompt for which no answer was asked, and what does where one is."""
    endings: tuple[str, ...]
    """What may stand after an answer, the longest first."""
    blank: str
    """White space that the template writes after an answer."""
    pads: tuple[str, ...]
    """What may stand before a conversation; where a mark that begins one is an EOS (GLM), that one may not."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, ends: Iterable[str], apply: Apply | None) -> Turns:
        """Asks the chat template, if there is one that can be asked.

        Args:
            ends: the tokens that end a text, as text.
        """
        any_bos = tokenizer.bos_token or ""
        ends = {end for end in (*ends, tokenizer.eos_token) if end}
        pads = ends | {pad for pad in (tokenizer.pad_token or tokenizer.unk_token,) if pad}
        asked = None if apply is None else _ask(apply)
        if asked is None:
            return cls("", any_bos, (), "", (), None, longest_first(pads), "", longest_first(pads))
        starts, bare, generating, answered, closing = asked
        bos = any_bos if any_bos and starts[0].startswith(any_bos) else ""
        openings = [(answered, generating), (generating, generating)]
        if generating.startswith(bare) and generating != bare:
            openings += [
                (seen.removeprefix(bare), generating.removeprefix(bare))
                for seen, _ in openings
                if seen.startswith(bare)
            ]
        ending = re.search(CONTROL, bare)
        begins = longest_first(_first_mark(start.removeprefix(any_bos)) for start in starts)
        return cls(
            bos=bos,
            any_bos=any_bos,
            begins=begins,
            turn_end=ending[0] if ending else "",
            openings=tuple((_loosely(seen), meant) for seen, meant in dict.fromkeys(openings) if seen.strip()),
            unasked=(_loosely(bare), generating) if bare.strip() else None,
            endings=longest_first(pads | {closing.rstrip(), closing.strip(), *CONTROL.findall(closing)}),
            blank=closing if closing.isspace() else "",
            pads=longest_first(pads - set(begins)),
        )

    def split(self, text: str, prompt: str = "") -> tuple[str, str]:
        """A rendered prompt and the response in a whole conversation to which a template was applied already.

        The response begins after ``prompt`` where the text does, else after the last place at which the chat template
        lets an answer begin; where there is none, all of it is the prompt, and what is read at its end is the same.
        What the template writes before and after an answer, pads and end-of-sequence tokens are put in order, so that
        the text scores as its prompt and response do by themselves.
        """
        text, known = self._unpadded(text), self._unpadded(prompt)
        if known and text.startswith(known):
            text = known + self.strip(text.removeprefix(known))
            found = [(m, o) for m, o in self._found(text) if m.start() <= len(known) <= m.end()]
        else:
            known, text = "", self.strip(text, whole=True)
            found = self._found(text)
        if found:
            match, opening = max(found, key=lambda one: one[0].end())
            return self._begun(text[: match.start()] + opening), text[match.end() :]
        begun = self.complete(known) if known else text
        return self._begun(begun), text.removeprefix(known) if known else ""

    def strip(self, response: str, *, whole: bool = False) -> str:
        """``response`` without what the template writes after it, end-of-sequence tokens and pads. In a ``whole``
        conversation nothing is taken from the mark that opens an answer (an EOS of Phi-3): the answer is empty.
        """
        text = response
        while True:
            bare = text.rstrip()
            end = next((end for end in self.endings if bare.endswith(end)), None)
            if end is None or (whole and self._opens_with(end, text)):
                break
            text = bare.removesuffix(end)
        return text.removesuffix(self.blank) if text == response else text

    def is_rendered(self, prompt: str) -> bool:
        """Whether the template has been applied to ``prompt`` already: it ends where an answer begins, or it begins as
        a conversation does and a turn ends in it, where turns have an end.
        """
        bare = self._unpadded(prompt)
        if any(_at_end(pattern, bare) for pattern, _ in self.openings):
            return True
        begins = self._begins(bare) or bool(self.bos and bare.startswith(self.bos))
        return begins and self.turn_end in bare

    def complete(self, prompt: str) -> str:
        """A rendered prompt up to where the answer begins, whether that was asked for or not."""
        known = (*self.openings, self.unasked) if self.unasked else self.openings
        for pattern, opening in known:
            if (match := _at_end(pattern, prompt)) is not None:
                return prompt[: match.start()] + opening
        return prompt

    def _found(self, text: str) -> list[tuple[re.Match[str], str]]:
        return [(match, opening) for pattern, opening in self.openings for match in pattern.finditer(text)]

    def _opens_with(self, mark: str, text: str) -> bool:
        """Whether an answer begins at the very end of ``text``, after an opening that ends with ``mark``."""
        return any(
            opening.rstrip().endswith(mark) and _at_end(pattern, text) is not None for pattern, opening in self.openings
        )

    def _unpadded(self, text: str) -> str:
        while (pad := next((pad for pad in self.pads if text.startswith(pad)), None)) is not None:
            text = text.removeprefix(pad)
        return text

    def _begins(self, prompt: str) -> bool:
        return prompt.removeprefix(self.any_bos).lstrip(" ").startswith(self.begins)  # of no begins: never

    def _begun(self, prompt: str) -> str:
        """A rendered prompt that begins as the template begins it, BOS or none."""
        if not self._begins(prompt):
            return prompt
        return self.bos + prompt.removeprefix(self.any_bos).lstrip(" ")


def _ask(apply: Apply) -> tuple[list[str], str, str, str, str] | None:
    """How conversations begin; what stands between a question and its end, an answer to come, and an answer that is
    there; what follows an answer. None where it can't be told.
    """
    user, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    try:
        bare, generating = (apply([user], answer_next=answer_next) for answer_next in (False, True))
        whole = apply([user, answer], answer_next=False)
    except Exception:  # templates refuse by raising whatever they like
        return None
    if not all(QUESTION in text for text in (bare, generating, whole)) or ANSWER not in whole:
        return None
    begins = [generating.partition(QUESTION)[0]]
    with suppress(Exception):  # many templates refuse a system turn
        begins.append(apply([{"role": "system", "content": SYSTEM}, user], answer_next=True).partition(SYSTEM)[0])
    answered, _, closing = whole.rpartition(QUESTION)[2].partition(ANSWER)
    return begins, bare.rpartition(QUESTION)[2], generating.rpartition(QUESTION)[2], answered, closing


def _first_mark(begin: str) -> str:
    """The first control token of ``begin``, else its first line."""
    mark = CONTROL.match(begin)
    return mark[0] if mark else begin.partition("\n")[0]


def _loosely(text: str) -> re.Pattern[str]:
    """``text``, with any of its white space there, or gone, or a space: decoding does that beside special tokens."""
    parts = re.split(r"(\s+)", text)
    return re.compile("".join(f"(?:{re.escape(part)}| ?)" if part.isspace() else re.escape(part) for part in parts))


def _at_end(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last place of ``pattern``, if only white space follows."""
    *_, last = (None, *pattern.finditer(text))
    return last if last is not None and not text[last.end() :].strip() else None


def longest_first(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(filter(None, texts), key=lambda text: (-len(text), text)))
