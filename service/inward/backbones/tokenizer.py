"""The backbone's tokenizer, its chat template and the ids that end its texts, read without torch and without
transformers: an API replica has neither.

``tokenizer.json`` holds the tokenizer itself. ``tokenizer_config.json`` (in older models also
``special_tokens_map.json`` and ``added_tokens.json``) names special tokens and those that were added later. The
template is in ``chat_template.jinja`` or in the configuration. They are read as transformers' ``TokenizersBackend``
reads them, so that ids and texts are its own; ``tests/backbones/test_tokenizer.py`` compares them.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inward.errors import SetupError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

    from inward.backbones.chat_template import ChatTemplate

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that every tokenizer may have; other names in the configuration that end so are a model's own."""
PROBES = (
    "In 1984, the  2nd  edition cost £12.50.\n\nIt's naïve, isn't it?",
    "def f(x):\n    return x**2  # 日本語 🙂",
    "<|im_end|></s><eos>",
)
"""Texts whose tokens stand for the tokenizer: digits, spaces, contractions, accents, code, scripts, control tokens."""
NO_LIMIT = int(1e30)
"""What transformers says of a tokenizer that states no longest text."""
ONLY_TRANSFORMERS = ("fix_mistral_regex", "fast_tokenizer_files", "split_special_tokens")
"""Switches of the configuration that change the ids in ways that are left to transformers."""


class FolderTokenizer:
    """The tokenizer in a model's folder, with the part of transformers' interface that is used here.

    Args:
        folder: with a ``tokenizer.json``.

    Raises:
        Exception: whatever ``tokenizers`` raises for a file that it can't read.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        config = _config(folder)
        self._backend: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if self._backend.padding:
            config.setdefault("pad_token", self._backend.padding["pad_token"])
        self._backend.no_truncation()
        self._backend.no_padding()
        self.special_tokens = _special_tokens(config)
        self.chat_template = _chat_template(folder, config)
        self.model_max_length = config.get("model_max_length") or config.get("max_len") or NO_LIMIT
        self.tidies = bool(config.get("clean_up_tokenization_spaces")) and type(self._backend.model).__name__ != "BPE"
        _add_tokens(self._backend, folder, config)
        self.bos_token, self.eos_token = self.special_tokens.get("bos_token"), self.special_tokens.get("eos_token")
        self.pad_token, self.unk_token = self.special_tokens.get("pad_token"), self.special_tokens.get("unk_token")
        self.bos_token_id, self.eos_token_id = self._id(self.bos_token), self._id(self.eos_token)

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id, added ones too."""
        return dict(self._backend.get_vocab())

    def __call__(
        self, text: str | Sequence[str], *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> dict[str, Any]:
        """``input_ids`` of one text, or of each of several.

        Args:
            text: one, or several.
            add_special_tokens: what the tokenizer writes around a text by itself, such as a BOS.
            split_special_tokens: a control token that stands in the text is text like any other.
        """
        texts = [text] if isinstance(text, str) else list(text)
        backend = self._splitting if split_special_tokens else self._backend
        ids = [encoded.ids for encoded in backend.encode_batch(texts, add_special_tokens=add_special_tokens)]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ``token_ids``."""
        text = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return _tidied(text) if self.tidies else text

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """Tokens beside the model's vocabulary by their ids, the special ones among them."""
        return self._backend.get_added_tokens_decoder()

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as text. ``variables`` are the template's, beside its own.

        Raises:
            ValueError: there is no template, or ids are asked for.
            jinja2.TemplateError: the template is damaged, or refuses the conversation.
        """
        if tokenize:
            raise ValueError("a chat template gives text here; tokenise it")
        return self._renderer.render(conversation, add_generation_prompt, **variables)

    @cached_property
    def _renderer(self) -> ChatTemplate:
        from inward.backbones.chat_template import ChatTemplate

        return ChatTemplate(self.chat_template, self.special_tokens)

    @cached_property
    def _splitting(self) -> Tokenizer:
        """A tokenizer of its own: a switch on one that other threads use would be theirs too."""
        backend = copy.deepcopy(self._backend)
        backend.encode_special_tokens = True
        return backend

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)


def tokenizer_hash(tokenizer: Any) -> str:
    """Equal where two processes turn the same text into the same tokens: over the vocabulary, what a template writes
    around texts, and the tokens of some.
    """
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{index} {token}\n".encode(errors="surrogatepass"))
    tokens = [tokenizer(text)["input_ids"] for text in PROBES]
    digest.update(json.dumps([tokens, tokenizer.chat_template]).encode())
    return digest.hexdigest()[:32]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of the model in ``folder``: a ``FolderTokenizer`` where there is a ``tokenizer.json``, else
    transformers' own, which knows the older formats.

    Raises:
        SetupError: the folder holds no tokenizer, a broken one, or one that needs transformers, and they are not
            installed.
    """
    if not folder.is_dir():
        raise SetupError(f"{folder} is not a folder; give the folder of a Hugging Face model, with its tokenizer.json")
    try:
        if reason := _needs_transformers(folder):
            return _from_transformers(folder, reason)
        return FolderTokenizer(folder)
    except SetupError:
        raise
    except Exception as error:  # whatever the many tokenizer classes raise
        raise SetupError(
            f"no tokenizer could be loaded from {folder}: {error}. The folder needs a tokenizer.json (save one with "
            "save_pretrained)"
        ) from error


def _needs_transformers(folder: Path) -> str | None:
    if not (folder / "tokenizer.json").is_file():
        return "there is no tokenizer.json"
    config = _config(folder)
    switch = next((name for name in ONLY_TRANSFORMERS if config.get(name)), None)
    return None if switch is None else f"tokenizer_config.json sets {switch}"


def _from_transformers(folder: Path, reason: str) -> Any:
    if find_spec("transformers") is None:
        raise SetupError(
            f"{folder}: {reason}, and such a tokenizer is read by transformers, which is not installed here: install "
            "inward[standard], or save the tokenizer anew with save_pretrained, which writes a tokenizer.json"
        )
    import transformers

    fast = (folder / "tokenizer.json").is_file()
    loader = transformers.PreTrainedTokenizerFast if fast else transformers.AutoTokenizer
    tokenizer: Any = loader.from_pretrained(folder, local_files_only=True)
    tokenizer.apply_chat_template = partial(_render, tokenizer)
    return tokenizer


def _render(
    tokenizer: Any, conversation: list[dict[str, str]], *, tokenize: bool = False, add_generation_prompt: bool = False,
    **variables: Any,
) -> str:  # fmt: skip
    """In the place of transformers' own, which takes no function for the date since 5.24."""
    from inward.backbones.chat_template import ChatTemplate

    return ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens_map).render(
        conversation, add_generation_prompt, **variables
    )


def _config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json``, and what ``special_tokens_map.json`` says instead in models from before it listed the
    added tokens itself.
    """
    config = _json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _json(folder / "special_tokens_map.json")
    if not config.get("extra_special_tokens"):
        config["extra_special_tokens"] = config.get("additional_special_tokens") or []
    if isinstance(config["extra_special_tokens"], dict):  # a model's own names
        config |= config.pop("extra_special_tokens")
    return config


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds no JSON object")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens, as templates may write them."""
    names = [*NAMED, *(name for name in config if name.endswith("_token") and name not in NAMED)]
    return {name: _content(config[name]) for name in names if _is_token(config.get(name))}


def _is_token(stated: Any) -> bool:
    return isinstance(stated, str) or (isinstance(stated, dict) and "content" in stated)


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _add_tokens(backend: Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Adds what the configuration names and ``tokenizer.json`` has not; most have all of it."""
    listed = config.get("added_tokens_decoder")
    if listed is None:
        added = {int(index): token for token, index in _json(folder / "added_tokens.json").items()}
        named = {*_special_tokens(config).values(), *map(_content, config.get("extra_special_tokens", ()))}
        listed = {i: {"content": t, "normalized": t not in named, "special": t in named} for i, t in added.items()}
        listed = {i: token for i, token in listed.items() if i not in backend.get_added_tokens_decoder()}
    there = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    tokens = [_added(listed[index]) for index in sorted(listed, key=int)]
    tokens = [token for token in tokens if repr(token) not in there]
    known = {token.content for token in [*backend.get_added_tokens_decoder().values(), *tokens]}
    for name in _special_tokens(config):
        tokens += _unknown(config[name], known, {"special": True})
    for token in config.get("extra_special_tokens", ()):
        tokens += _unknown(token, known, {})
    if tokens:
        backend.add_tokens(tokens)


def _unknown(token: str | Mapping[str, Any], known: set[str], flags: Mapping[str, bool]) -> list[AddedToken]:
    if _content(token) in known:
        return []
    known.add(_content(token))
    return [_added({"content": token, "special": True} if isinstance(token, str) else {**token, **flags})]


def _added(token: Mapping[str, Any]) -> AddedToken:
    from tokenizers import AddedToken

    return AddedToken(**{name: value for name, value in token.items() if name != "__type"})


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """A file of its own goes before the configuration's; several are given by name, of which ``default`` is ours."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    templates = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    if not templates:
        stated = config.get("chat_template")
        return {row["name"]: row["template"] for row in stated} if isinstance(stated, list) else stated
    return templates["default"] if templates.keys() == {"default"} else templates


def _tidied(text: str) -> str:
    """As transformers tidies what WordPiece and Unigram tokenizers write, where their configuration asks for it."""
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for contraction in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {contraction}", contraction)
    return text
