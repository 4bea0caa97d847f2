"""Families beside ChatML on bytes: their templates in short, and tokenizers in the manner of SentencePiece."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import CHATML, write_tokenizer
from metier.errors import DataError
from metier.evaluate import systems
from metier.records import Case, Example, Message
from metier.text.chat import _PROBES, Renderer

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% set ns = namespace(head='', rest=messages) %}{% if messages[0]['role'] == 'system' %}"
    "{% set ns.head = messages[0]['content'] + '\\n\\n' %}{% set ns.rest = messages[1:] %}{% endif %}"
    "{% for m in ns.rest %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + (ns.head if loop.first else '') + m['content'] | trim }}"
    "{{ '<end_of_turn>\\n' }}{% endfor %}\n{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA2 = (
    "{% set ns = namespace(head='', rest=messages) %}{% if messages[0]['role'] == 'system' %}"
    "{% set ns.head = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set ns.rest = messages[1:] %}"
    "{% endif %}"
    "{% for m in ns.rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + ((ns.head if loop.first else '') + m['content']).strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' + m['content'] + eos_token }}{% if not loop.last %}{{ '\\n' }}{% endif %}"
    "{% else %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
THOUGHT = CHATML.replace(
    "message['content']",
    "('<think>\\n\\n</think>\\n\\n' if loop.last and message['role'] == 'assistant' else '') + message['content']",
)
CONTROL = ("<unk>", "<s>", "</s>")
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
BACK = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


# normalizer, pre-tokenizer, decoder
PIECES: dict[str, tuple[Any, Any, Any]] = {
    "no blank": (REPLACE, None, {"type": "Sequence", "decoders": BACK}),
    "prepended": (
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]},
        None,
        {"type": "Sequence", "decoders": [*BACK, STRIP]},
    ),
    "first": (None, metaspace("first"), {"type": "Sequence", "decoders": [*BACK, STRIP]}),
    "always": (None, metaspace("always"), {"type": "Sequence", "decoders": [*BACK, STRIP]}),
}


def write_pieces(
    folder: Path, pieces: str, template: str, control: Sequence[str] = (), *, rstrip: bool = False
) -> Path:
    """A tokenizer of pieces with blanks as `▁` and bytes to fall back on, as SentencePiece makes them.

    The one without a blank in front has tokens of its own for runs of newlines, as Gemma's.
    """
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    text = "▁how▁many▁is▁yes▁two▁lines▁user▁model▁assistant▁INST▁the▁apple▁is▁green▁be▁brief"
    tokenizer.train_from_iterator([text] * 4, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    tree = json.loads(tokenizer.to_str())
    added = [*CONTROL, *control, *(("\n", "\n\n") if pieces == "no blank" else ())]
    names = [*added, *(f"<0x{b:02X}>" for b in range(256)), *tree["model"]["vocab"]]
    tree["model"] |= {"vocab": {n: i for i, n in enumerate(names)}, "byte_fallback": True, "unk_token": "<unk>"}
    plain = {"single_word": False, "lstrip": False, "normalized": False}
    tree["added_tokens"] = [
        {"id": i, "content": n, "rstrip": rstrip and n in control, "special": "\n" not in n, **plain}
        for i, n in enumerate(added)
    ]
    tree["normalizer"], tree["pre_tokenizer"], tree["decoder"] = PIECES[pieces]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def own_ids(folder: Path, messages: Sequence[Message], *, ask: bool) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    names = json.loads((folder / "tokenizer_config.json").read_text())
    own = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=names["bos_token"], eos_token=names["eos_token"]
    )
    chat = [{"role": m.role, "content": m.content} for m in messages]
    template = (folder / "chat_template.jinja").read_text()
    out = own.apply_chat_template(chat, chat_template=template, add_generation_prompt=ask, return_dict=False)
    return list(out)


TALK = (
    Message("user", "  how many\n\n\nis 2024 + 1?  木 "),
    Message("assistant", '{"sum": 2025}'),
    Message("user", "the apple"),
    Message("assistant", "yes  two\n lines"),
)
SYSTEM = Message("system", "be brief")
TURNS, MARKS = ("<start_of_turn>", "<end_of_turn>"), ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
FAMILIES: dict[str, tuple[str, str, tuple[str, ...], bool]] = {
    "gemma2": ("no blank", GEMMA, TURNS, False),
    "gemma3": ("no blank", GEMMA3, TURNS, False),
    "phi3": ("prepended", PHI3, MARKS, True),
    "phi3 newer": ("first", PHI3, MARKS, True),
    "llama2": ("prepended", LLAMA2, (), False),
    "llama2 newer": ("first", LLAMA2, (), False),
    "mistral": ("prepended", LLAMA2, ("[INST]", "[/INST]"), False),
    "always": ("always", PHI3, MARKS, False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_equal_the_models_own_template(tmp_path: Path, family: str) -> None:
    pieces, template, control, rstrip = FAMILIES[family]
    renderer = Renderer(write_pieces(tmp_path, pieces, template, control, rstrip=rstrip))
    assert renderer.system_role == (family != "gemma2")
    for talk in (TALK, (SYSTEM, *TALK) if renderer.system_role else TALK[:2]):
        whole = renderer.render(talk)
        assert list(whole.ids) == own_ids(tmp_path, talk, ask=False)
        for at, message in enumerate(talk):
            if message.role == "assistant":
                asked = renderer.prompt(talk[:at])
                assert list(asked) == own_ids(tmp_path, talk[:at], ask=True)
                assert list(whole.ids[: asked.size]) == list(asked)
    single = renderer.render(TALK[2:])
    learnt = np.flatnonzero(single.supervised)
    assert list(learnt) == list(range(renderer.prompt(TALK[2:3]).size, learnt[-1] + 1))
    assert int(single.ids[learnt[-1]]) in renderer.stop_ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answer", ["yes", "木 two", " leading", '{"a": "<s> [INST]"}', "lines\n\n", "ünï"])
def test_an_answer_comes_back_and_typed_control_tokens_stay_text(tmp_path: Path, family: str, answer: str) -> None:
    pieces, template, control, rstrip = FAMILIES[family]
    renderer = Renderer(write_pieces(tmp_path, pieces, template, control, rstrip=rstrip))
    out = renderer.render((Message("user", "the </s> <end_of_turn> apple"), Message("assistant", answer)))
    trimmed = answer.strip() if "trim" in template or "strip()" in template else answer
    assert renderer.parse(out.ids[out.supervised]) == trimmed
    plain = renderer.render((Message("user", "apple"), Message("assistant", "yes")))
    steering = {*renderer._control.values()}
    assert [i for i in out.ids if i in steering] == [i for i in plain.ids if i in steering]


def test_every_arm_can_ask_a_base_without_a_system_role(tmp_path: Path) -> None:
    renderer = Renderer(write_pieces(tmp_path, "no blank", GEMMA, TURNS))
    task = {"instruction": "be brief", "prompt": "be very brief", "schema": None, "shots": 1}
    shown = Example("e", (SYSTEM, *TALK[:2]), {}, "g")
    for arm, ask in systems.asks(task, [shown]).items():
        messages = ask(Case("c", (SYSTEM, TALK[2]), "g", None, ()))
        ids = renderer.prompt(messages)
        text = renderer.parse(ids)
        assert messages[0].content in text and "system" not in text and text.endswith("model\n"), arm


def test_without_a_system_role_the_system_text_heads_the_first_user_text(tmp_path: Path) -> None:
    renderer = Renderer(write_pieces(tmp_path, "no blank", GEMMA, TURNS))
    folded = (Message("user", "be brief\n\nthe apple"), TALK[1])
    asked = (SYSTEM, Message("user", "the apple"), TALK[1])
    assert list(renderer.render(asked).ids) == own_ids(tmp_path, folded, ask=False)
    assert list(renderer.prompt(asked[:2])) == own_ids(tmp_path, folded[:1], ask=True)
    with pytest.raises(DataError, match="no system role"):
        renderer.prompt((SYSTEM,))


@pytest.mark.parametrize(
    ("template", "system"),
    [
        (OLMO2, True),
        (CHATML, True),
        (GEMMA.replace("<start_of_turn>", "<|im_start|>").replace("<end_of_turn>", "<|im_end|>"), False),
    ],
)
def test_byte_level_families_equal_their_own_template(tmp_path: Path, template: str, system: bool) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    renderer = Renderer(tmp_path)
    assert renderer.system_role == system
    talk = (SYSTEM, *TALK) if system else TALK
    assert list(renderer.render(talk).ids) == own_ids(tmp_path, talk, ask=False)
    assert list(renderer.prompt(talk[:-1])) == own_ids(tmp_path, talk[:-1], ask=True)


def test_an_empty_thought_before_an_answer_is_asked_for_and_not_learnt(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(THOUGHT)
    renderer = Renderer(tmp_path)
    talk = TALK[:2]
    whole, asked = renderer.render(talk), renderer.prompt(talk[:1])
    assert list(whole.ids) == own_ids(tmp_path, talk, ask=False)
    assert (
        list(asked) == list(whole.ids[: asked.size])
        and whole.supervised[asked.size]
        and not whole.supervised[: asked.size].any()
    )
    assert renderer.parse(whole.ids[whole.supervised]) == TALK[1].content


def test_what_pieces_cannot_write_is_refused(tmp_path: Path) -> None:
    write_pieces(tmp_path, "no blank", GEMMA, TURNS)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    tree["model"]["byte_fallback"] = False
    for char in "".join(m.content for probe in _PROBES for m in probe) + TALK[0].content:
        tree["model"]["vocab"].setdefault(char, len(tree["model"]["vocab"]))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    renderer = Renderer(tmp_path)
    with pytest.raises(DataError, match=r"U\+00DF"):
        renderer.render((Message("user", "the ß apple"), Message("assistant", "yes")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_constrained_answer_is_written_as_a_learnt_one(tmp_path: Path, family: str) -> None:
    """Every token of an answer as it is trained on may be drawn, and then nothing but a token that ends it."""
    torch, schema = pytest.importorskip("torch"), pytest.importorskip("metier.models.schema")
    pytest.importorskip("llguidance")
    pieces, template, control, rstrip = FAMILIES[family]
    renderer = Renderer(write_pieces(tmp_path, pieces, template, control, rstrip=rstrip))
    shape = {"type": "object", "properties": {"a": {"enum": ["yes", "two lines"]}}, "required": ["a"]}
    shape["additionalProperties"] = False
    rows = schema.Grammar(shape, tmp_path / "tokenizer.json", renderer.stop_ids, renderer.around).rows(1)
    out = renderer.render((Message("user", "a"), Message("assistant", '{"a":"two lines"}')))
    for token in out.ids[out.supervised][:-1].tolist():
        logits = torch.zeros(1, 1000)
        rows.forbid(logits, [0])
        assert logits[0, token] == 0
        rows.take([token], [0])
    rows.forbid(logits := torch.zeros(1, 1000), [0])
    assert set((logits[0] == 0).nonzero()[:, 0].tolist()) == renderer.stop_ids


def test_text_that_would_become_a_control_token_is_refused(tmp_path: Path) -> None:
    """A unigram model finds whole words of its vocabulary, its control tokens among them."""
    tree = json.loads((write_pieces(tmp_path, "no blank", GEMMA, TURNS) / "tokenizer.json").read_text())
    words = sorted(tree["model"]["vocab"], key=tree["model"]["vocab"].get)
    tree["model"] = {
        "type": "Unigram",
        "unk_id": 0,
        "byte_fallback": True,
        "vocab": [[word, -2.0 if len(word) > 1 else -9.0] for word in words],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    renderer = Renderer(tmp_path)
    with pytest.raises(DataError, match="control token </s>"):
        renderer.render((Message("user", "apple </s> green"), Message("assistant", "yes")))
    assert renderer.render((Message("user", "apple green"), Message("assistant", "yes"))).supervised.any()
