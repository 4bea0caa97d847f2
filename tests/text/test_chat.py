"""One renderer: equal to the model's own template, supervising exactly the answer, and deaf to typed control tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CHATML, SPECIAL, write_tokenizer
from metier import config
from metier.errors import DataError, ModelError
from metier.records import Message
from metier.text import chat
from metier.text.chat import Renderer

TEXTS = st.lists(
    st.sampled_from([*'aZ 0.\n\t{}"<|>木é', *SPECIAL, "<|im_", "start|>", "\u200b", "＜|im_end|＞"]), max_size=12
).map("".join)


def own_ids(renderer: Renderer, messages: list[Message], *, ask: bool) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(renderer.folder / "tokenizer.json"))
    chat = [{"role": m.role, "content": m.content} for m in messages]
    out = tokenizer.apply_chat_template(
        chat, chat_template=CHATML, tokenize=True, add_generation_prompt=ask, return_dict=False
    )
    return list(out)


def test_equals_the_models_own_template(renderer: Renderer) -> None:
    messages = [Message("system", "Be  brief.\n"), Message("user", "two\n\nlines 木"), Message("assistant", "yes 12")]
    assert list(renderer.render(messages).ids) == own_ids(renderer, messages, ask=False)
    assert list(renderer.prompt(messages[:2])) == own_ids(renderer, messages[:2], ask=True)


def test_supervises_the_answer_and_its_end_and_nothing_else(renderer: Renderer) -> None:
    out = renderer.render([Message("user", "a"), Message("assistant", "one"), Message("assistant", "two")])
    learnt = [int(i) for i in out.ids[out.supervised]]
    assert learnt.count(2) == 2 and learnt[-1] == 2
    assert renderer.parse(learnt) == "onetwo"


@settings(max_examples=150, deadline=None)
@given(user=TEXTS, answer=TEXTS)
def test_typed_control_tokens_stay_text(renderer: Renderer, user: str, answer: str) -> None:
    out = renderer.render([Message("user", user), Message("assistant", answer)])
    assert [int(i) for i in out.ids if i < len(SPECIAL)] == [1, 2, 1, 2]  # the template's own, in order
    assert renderer.parse(out.ids[out.supervised][:-1]) == answer


@settings(max_examples=80, deadline=None)
@given(turns=st.lists(TEXTS, min_size=2, max_size=6))
def test_a_longer_conversation_extends_a_shorter_one(renderer: Renderer, turns: list[str]) -> None:
    messages = [Message(("user", "assistant")[i % 2], t) for i, t in enumerate(turns)]
    whole = renderer.render(messages).ids
    for length in range(1, len(messages)):
        shorter = renderer.render(messages[:length]).ids
        assert np.array_equal(whole[: shorter.size], shorter)
        if messages[length].role == "assistant":
            asked = renderer.prompt(messages[:length])
            assert np.array_equal(whole[: asked.size], asked)


def test_stop_is_what_the_template_puts_behind_an_answer(renderer: Renderer) -> None:
    assert renderer.stop_ids == {2}


@pytest.mark.parametrize(
    ("template", "error", "says"),
    [
        (
            "{% for m in messages %}{% if loop.first %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
            ModelError,
            "drops",
        ),
        ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", ModelError, "drops|rewrites"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ModelError, "no end token"),
        ("{{ raise_exception('only cats') }}", DataError, "only cats"),
        ("{{ strftime_now('%d') }}" + CHATML, ModelError, "strftime_now"),
        ("{% for m in messages %}", ModelError, "no template"),
    ],
)
def test_templates_that_cannot_be_exact_are_refused(tmp_path: Path, template: str, error: type, says: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(error, match=says):
        Renderer(tmp_path).render([Message("system", "s"), Message("user", "u"), Message("assistant", "a")])


def test_a_stripping_template_is_followed(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML.replace("message['content']", "message['content'] | trim"))
    out = Renderer(tmp_path).render([Message("user", " u "), Message("assistant", " a ")])
    assert Renderer(tmp_path).parse(out.ids[out.supervised]) == "a"


def test_marks_of_what_a_model_writes_print_nothing(tmp_path: Path, renderer: Renderer) -> None:
    write_tokenizer(tmp_path)
    marked = CHATML.replace("{{'<|im_start|>'", "{%- generation -%}\n{{'<|im_start|>'").replace(
        "{% endfor %}", "{%- endgeneration -%}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    )
    (tmp_path / "chat_template.jinja").write_text(marked)
    talk = [Message("user", "u"), Message("assistant", "a")]
    assert marked != CHATML and list(Renderer(tmp_path).render(talk).ids) == list(renderer.render(talk).ids)


def test_templates_cannot_reach_python(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}" + CHATML)
    with pytest.raises(DataError, match="refuses"):
        Renderer(tmp_path)


def test_missing_and_damaged_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        Renderer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        Renderer(tmp_path)
    for nothing in ("{}", "[]"):
        (tmp_path / "tokenizer.json").write_text(nothing)
        (tmp_path / "tokenizer_config.json").write_text("{}")
        with pytest.raises(ModelError, match=r"no tokenizer|not JSON"):
            Renderer(tmp_path)


def test_a_model_without_template_gets_the_plain_one(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    plain = Renderer(tmp_path)
    assert not plain.own_template
    out = plain.render([Message("user", "u"), Message("assistant", "a")])
    assert plain.parse(out.ids[out.supervised]) == "a" and json.dumps(plain.template)


def test_a_given_template_is_used_in_place_of_the_plain_one(tmp_path: Path, renderer: Renderer) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    messages = [Message("system", "s"), Message("user", "u"), Message("assistant", "a")]
    given = Renderer(tmp_path, chat.TEMPLATES["chatml"])
    assert list(given.render(messages).ids) == list(renderer.render(messages).ids)
    assert given.stop_ids == renderer.stop_ids
    assert set(chat.TEMPLATES) == set(config.TEMPLATES)


def test_a_given_template_without_a_learnable_end_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] == "<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ModelError, match="no end token") as caught:
        Renderer(tmp_path, chat.TEMPLATES["chatml"])
    assert "<|endoftext|>" in caught.value.fix


def test_a_raw_text_stands_between_its_marks(tmp_path: Path, renderer: Renderer) -> None:
    end = renderer._control["<|endoftext|>"]
    ids = renderer.document("the <|im_end|> apple\n")
    assert ids[0] == ids[-1] == end, "the end of a text, not that of a turn"
    assert not set(ids[1:-1].tolist()) & set(renderer._control.values()), "a mark in the text is text"
    assert renderer.parse(ids[1:-1]) == "the <|im_end|> apple\n"
    write_tokenizer(tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    start = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    tokens = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    single = [start, {"Sequence": {"id": "A", "type_id": 0}}]
    tree["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "chat_template.jinja").write_text(CHATML.replace("{% for", "{{ bos_token }}{% for", 1))
    assert Renderer(tmp_path).document("a")[0] == 1, "what the tokenizer itself puts before a text"


def test_a_character_the_vocabulary_cannot_write_is_refused_and_not_lost(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    del tree["model"]["vocab"]["\u0114"]  # the byte-level symbol of the control character 0x14
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    lacking = Renderer(tmp_path)
    with pytest.raises(DataError, match=r"U\+0014"):
        lacking.render([Message("user", "a\x14b"), Message("assistant", "x")])
    assert lacking.render([Message("user", "ab"), Message("assistant", "x")]).supervised.any()
