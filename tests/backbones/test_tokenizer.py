"""The tokenizer of a model folder beside transformers' own: the same ids, the same texts, the same conversations."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from inward.backbones.tokenizer import FolderTokenizer, _from_transformers, load_tokenizer, tokenizer_hash
from inward.errors import SetupError
from inward.processes.wiring import TOY
from inward.prompts import DATE, Prompts
from support import tiny_tokenizer

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALTERNATING = """
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}
{{ bos_token }}{% for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start>' + role + '\n' + message['content'] | trim + '</s>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}
"""
EVERYTHING = """
{%- set seen = namespace(user=0) -%}
{{- bos_token }}{{ strftime_now('%Y') }} {{ {'b': 'é <&>', 'a': [1]} | tojson }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {%- if seen.user > 5 %}{% break %}{% endif %}
    {%- if message.role == 'user' %}{% set seen.user = seen.user + 1 %}{{ '[' ~ seen.user ~ ']' }}{% endif %}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {%- else %}{{ message.content }}{% endif %}
{%- endfor %}
{%- if tools is not none %}tools{% endif %}{% if image_token is defined %}{{ image_token }}{% endif %}
{%- if add_generation_prompt %}[A]{% endif -%}
"""
TEXTS = (
    "", " ", "plain", "The harbour was quiet.", "  two  spaces\n\n\tand a tab ", "it 's done , isn 't it ?",
    "Grüße, naïve café", "日本語のテキスト", "🙂👩‍👩‍👧 emoji", "e\u0301 combining", "a</s>b <s> c",
    "<|im_start|>user\nHi<|im_end|>", "<image>x<added> y <added>", "\u00a0non-breaking", "NUL\x00 and \x7f", "x" * 300,
)  # fmt: skip
CONVERSATIONS = (
    [{"role": "user", "content": "Hi."}],
    [
        {"role": "user", "content": " a \n"},
        {"role": "assistant", "content": " b "},
        {"role": "user", "content": "c</s>"},
    ],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "<b> é"},
        {"role": "tool", "content": "{}"},
    ],
)


def train(model, trainer_class, **parts) -> Tokenizer:
    """A small tokenizer of any kind."""
    small = Tokenizer(model)
    for name, part in parts.items():
        setattr(small, name, part)
    small.train_from_iterator([*tiny_tokenizer.TEXTS, *TEXTS] * 2, trainer_class)
    return small


def save(folder: Path, tokenizer: Tokenizer, **config) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def added(content: str, **flags: bool) -> dict[str, object]:
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, **flags}


def qwen_like(folder: Path) -> Path:
    """Byte-level BPE; its control tokens stand in the configuration only."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    bpe = train(
        models.BPE(), trainer, normalizer=normalizers.NFC(),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False), decoder=decoders.ByteLevel(),
    )  # fmt: skip
    control = [added("<|im_start|>", special=True), added("<|im_end|>", special=True), added("<added>")]
    names = dict(enumerate(control, start=bpe.get_vocab_size()))
    return save(
        folder, bpe, added_tokens_decoder=names, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML,
        model_max_length=1000, clean_up_tokenization_spaces=True,
    )  # fmt: skip


def llama_like(folder: Path) -> Path:
    """SentencePiece's BPE with byte fallback and a BOS of its own, in the files that models before 2024 have."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    written = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False, max_token_length=8)
    model = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    bpe = train(model, trainer, normalizer=spaces, decoder=written)
    plain = json.loads(bpe.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["id"] < 3]
    bpe = Tokenizer.from_str(json.dumps(plain))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bpe.enable_truncation(20)
    bpe.enable_padding()
    save(folder, bpe, add_bos_token=True, add_eos_token=False, model_max_length=10**30, legacy=True)
    special = {"bos_token": added("<s>", normalized=True), "eos_token": added("</s>", normalized=True)}
    special |= {"unk_token": "<unk>", "additional_special_tokens": ["<image>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "added_tokens.json").write_text(json.dumps({"<added>": bpe.get_vocab_size()}))
    (folder / "chat_template.jinja").write_text(ALTERNATING)
    return folder


def unigram(folder: Path) -> Path:
    """SentencePiece's Unigram, with tokens that only the configuration names."""
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    model = train(
        models.Unigram(), trainer, normalizer=normalizers.NFKC(), pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )  # fmt: skip
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "additional_chat_templates/tool_use.jinja").write_text("tools")
    (folder / "chat_template.jinja").write_text(EVERYTHING)
    return save(
        folder, model, bos_token="<s>", eos_token={"__type": "AddedToken", **added("</s>", special=True)},
        unk_token="<unk>", image_token="<image>", extra_special_tokens=["<added>"], clean_up_tokenization_spaces=True,
    )  # fmt: skip


def word_piece(folder: Path) -> Path:
    """BERT's, which lowers the case and tidies what it writes."""
    names = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=names, show_progress=False)
    model = train(
        models.WordPiece(unk_token="[UNK]"), trainer, normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(), decoder=decoders.WordPiece(cleanup=False),
    )  # fmt: skip
    model.add_special_tokens([AddedToken("</s>", lstrip=True)])
    named = [{"name": "default", "template": CHATML}, {"name": "rag", "template": "documents"}]
    return save(
        folder, model, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]", chat_template=named,
        extra_special_tokens={"image_token": "<image>"}, clean_up_tokenization_spaces=True, max_len=512,
    )  # fmt: skip


def toy(folder: Path) -> Path:
    return TOY / "backbone"


def of_transformers(folder: Path) -> Path:
    """As ``save_pretrained`` writes one today."""
    tiny_tokenizer.of_transformers().save_pretrained(folder)
    return folder


FAMILIES = (toy, of_transformers, qwen_like, llama_like, unigram, word_piece)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def folder(request, tmp_path_factory) -> Path:
    return request.param(tmp_path_factory.mktemp(request.param.__name__))


@pytest.fixture(scope="module")
def ours(folder):
    loaded = load_tokenizer(folder)
    assert isinstance(loaded, FolderTokenizer)
    return loaded


@pytest.fixture(scope="module")
def theirs(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_texts_have_transformers_ids(ours, theirs, special, split):
    options = {"add_special_tokens": special, "split_special_tokens": split}
    assert ours(TEXTS, **options)["input_ids"] == theirs(list(TEXTS), **options)["input_ids"]
    assert [ours(text, **options)["input_ids"] for text in TEXTS] == ours(TEXTS, **options)["input_ids"]


@pytest.mark.parametrize("skip", [True, False])
def test_ids_have_transformers_texts(ours, theirs, skip):
    ids = [*theirs(list(TEXTS), add_special_tokens=True)["input_ids"], *([i] for i in range(len(theirs)))]
    texts = [ours.decode(one, skip_special_tokens=skip) for one in ids]
    assert texts == theirs.batch_decode(ids, skip_special_tokens=skip)


def test_names_and_sizes_are_transformers(ours, theirs):
    assert len(ours) == len(theirs)
    assert ours.special_tokens == theirs.special_tokens_map
    names = ("bos_token", "bos_token_id", "eos_token", "eos_token_id", "pad_token", "unk_token")
    for name in (*names, "model_max_length", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name), name
    added = {i: (token.content, token.special) for i, token in ours.added_tokens_decoder.items()}
    assert added == {i: (token.content, token.special) for i, token in theirs.added_tokens_decoder.items()}


@pytest.mark.parametrize("open_answer", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_conversations_are_rendered_as_by_transformers_or_refused_alike(
    ours, theirs, folder, conversation, open_answer, monkeypatch
):
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", SimpleNamespace(now=lambda: DATE))

    def render(tokenizer, **variables):
        try:
            return tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=open_answer, **variables
            )
        except Exception as error:
            return str(error)

    date = {"strftime_now": DATE.strftime}
    assert render(ours, **date) == render(theirs) == render(_from_transformers(folder, ""), **date)


def test_groups_and_the_name_of_the_template_are_those_of_transformers(ours, folder):
    one, other = Prompts(ours, max_tokens=10_000), Prompts(_from_transformers(folder, ""), max_tokens=10_000)
    assert one.template == other.template
    for text in filter(None, TEXTS):
        assert one.group(text, TEXTS[1:]) == other.group(text, TEXTS[1:])


def test_the_hash_is_the_same_whoever_loads_it_and_changes_with_what_texts_become(ours, theirs, folder, tmp_path):
    assert tokenizer_hash(ours) == tokenizer_hash(theirs)
    shutil.copytree(folder, tmp_path / "other", dirs_exist_ok=True)
    content = json.loads((folder / "tokenizer.json").read_text())
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(content, indent=3))
    assert tokenizer_hash(load_tokenizer(tmp_path / "other")) == tokenizer_hash(ours)
    (tmp_path / "other/chat_template.jinja").write_text("another")
    assert tokenizer_hash(load_tokenizer(tmp_path / "other")) != tokenizer_hash(ours)


@pytest.mark.parametrize("family", [toy, of_transformers, qwen_like], ids=lambda family: family.__name__)
def test_the_class_that_transformers_would_choose_gives_the_same_ids(family, tmp_path):
    folder = family(tmp_path / "model")
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert load_tokenizer(folder)(TEXTS)["input_ids"] == theirs(list(TEXTS))["input_ids"]


def test_a_template_is_somebody_elses_code_and_stays_in_its_sandbox(tmp_path):
    folder = of_transformers(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}{% set _ = messages.append(1) %}")
    with pytest.raises(Exception, match=r"__class__|unsafe|immutable|append"):
        load_tokenizer(folder).apply_chat_template([{"role": "user", "content": "x"}])


def test_of_several_templates_none_of_which_is_the_default_none_is_chosen(tmp_path):
    folder = of_transformers(tmp_path)
    (folder / "chat_template.jinja").rename(folder / "rag.jinja")
    (folder / "additional_chat_templates").mkdir()
    (folder / "rag.jinja").rename(folder / "additional_chat_templates/rag.jinja")
    with pytest.raises(ValueError, match="default"):
        load_tokenizer(folder).apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("older", ["no tokenizer.json", "a switch of transformers"])
def test_what_only_transformers_can_read_is_left_to_it_and_needs_it(older, tmp_path, monkeypatch):
    folder = of_transformers(tmp_path)
    if older == "no tokenizer.json":
        (folder / "tokenizer.json").unlink()
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"split_special_tokens": True}))
        assert isinstance(load_tokenizer(folder), PreTrainedTokenizerFast)
    monkeypatch.setattr("inward.backbones.tokenizer.find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"inward\[standard\]"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("file", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "[]"), ("tokenizer_config.json", "{")]
)
def test_a_damaged_file_is_refused(file, content, tmp_path):
    folder = of_transformers(tmp_path)
    (folder / file).write_text(content)
    with pytest.raises(SetupError, match="no tokenizer could be loaded"):
        load_tokenizer(folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(SetupError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(SetupError, match="not a folder"):
        load_tokenizer(tmp_path / "missing")


def test_it_needs_neither_torch_nor_transformers():
    code = (
        "import sys, pathlib; from inward.backbones.tokenizer import load_tokenizer;"
        "t = load_tokenizer(pathlib.Path(sys.argv[1])); t.apply_chat_template([{'role': 'user', 'content': 'x'}]);"
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    service = Path(__file__).parents[2] / "service"
    assert subprocess.run([sys.executable, "-c", code, TOY / "backbone"], cwd=service, check=False).returncode == 0
