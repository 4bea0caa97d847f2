"""The one renderer: training, proof, rollouts and serving turn messages into token ids here and nowhere else.

The model's own chat template is rendered with placeholders where the contents belong, and the contents are put in
afterwards, as text that can never become a control token: `<|im_end|>` typed by a user is six ordinary tokens. Text
between two control tokens is tokenised in one piece, as the model's own tokenizer would; an answer starts a piece of
its own, so that the ids of a prompt are always the beginning of the ids of the whole conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from metier.errors import DataError, ModelError
from metier.records import Message

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)
_MARK = re.compile("\ue000(\\d+)\ue001")
_PROBES = (
    (Message("system", "Be brief."), Message("user", "How many is 2024 + 1?"), Message("assistant", '{"sum": 2025}')),
    (Message("user", "two\n\nlines, ünïcode 木 and   spaces"), Message("assistant", "yes")),
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids (T,) int64 of a conversation, and which of them the model must learn to produce (T,) bool."""

    ids: np.ndarray
    supervised: np.ndarray


class Renderer:
    """Messages to ids for one model folder: its `tokenizer.json`, its template, its special tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tree = _json(folder / "tokenizer.json")
        settings = _json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        self.template, self.own_template = _template(folder, settings)
        self._special = {k: _token(settings.get(k)) for k in ("bos_token", "eos_token", "pad_token")}
        self._control = self._control_ids(tree)
        self._split = re.compile("|".join(re.escape(t) for t in sorted(self._control, key=len, reverse=True)))
        self._whole = _tokenizer(tree, folder)
        kept = [t for t in tree.get("added_tokens", ()) if t["content"] not in self._control]
        self._plain = _tokenizer({**tree, "added_tokens": kept, "post_processor": None}, folder)
        self._unwritable = _missing_bytes(tree)
        self._environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._environment.globals["raise_exception"] = _raise
        self._environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        self._compiled = self._environment.from_string(self.template)
        self.stop_ids = self._stops()
        self._hold_own_rendering()

    def render(self, messages: Sequence[Message]) -> Rendered:
        """A whole conversation; supervised are the assistant's texts and the token that ends each."""
        ids: list[int] = []
        supervised: list[bool] = []
        for piece, learnt in self._pieces(messages, generation_prompt=False):
            ids += piece
            supervised += [learnt] * len(piece)
        return Rendered(np.array(ids, dtype=np.int64), np.array(supervised, dtype=bool))

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """Ids (T,) of a conversation up to the point where the assistant begins to answer."""
        pieces = self._pieces(messages, generation_prompt=True)
        return np.array([i for piece, _ in pieces for i in piece], dtype=np.int64)

    def parse(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, without the token that ended it; NUL, which no record may hold, as U+FFFD."""
        kept = [i for i in ids if i not in self.stop_ids]
        return str(self._whole.decode(kept, skip_special_tokens=False)).replace("\0", "\ufffd")

    def count(self, text: str) -> int:
        """Tokens of a text as content."""
        return len(self._plain.encode(text, add_special_tokens=False).ids)

    def _pieces(self, messages: Sequence[Message], *, generation_prompt: bool) -> list[tuple[list[int], bool]]:
        """(ids, supervised) in order; an answer and the control token behind it are supervised."""
        pieces: list[tuple[list[int], bool]] = []
        open_text, after_answer = "", False
        for text, role in self._spans(messages, generation_prompt):
            if role == "assistant":
                pieces.append((self._encode(open_text), False))
                pieces.append((self._encode(text), True))
                open_text, after_answer = "", True
            elif role == "control":
                pieces.append((self._encode(open_text), False))
                pieces.append(([self._control[text]], after_answer))
                open_text, after_answer = "", False
            else:
                open_text += text
        pieces.append((self._encode(open_text), False))
        return [(ids, learnt) for ids, learnt in pieces if ids]

    def _spans(self, messages: Sequence[Message], generation_prompt: bool) -> list[tuple[str, str]]:
        """(text, role) in order: contents by their message's role, control tokens, and the template's own text."""
        skeleton = self._run([Message(m.role, f"\ue000{i}\ue001") for i, m in enumerate(messages)], generation_prompt)
        parts = _MARK.split(skeleton)
        if [int(i) for i in parts[1::2]] != list(range(len(messages))):
            roles = ", ".join(m.role for m in messages)
            raise ModelError(
                f"the model's chat template drops or moves a message of ({roles})",
                where=str(self.folder),
                fix="use roles this model knows; some have no system role",
            )
        contents = self._contents(messages, skeleton, generation_prompt)
        spans: list[tuple[str, str]] = []
        for at, part in enumerate(parts):
            if at % 2:
                spans.append((contents[int(part)], messages[int(part)].role))
            else:
                spans += self._template_spans(part)
        return spans

    def _contents(self, messages: Sequence[Message], skeleton: str, generation_prompt: bool) -> list[str]:
        """The contents as the template prints them: as they are, or stripped; anything else is refused."""
        actual = self._run(messages, generation_prompt)
        for change in (str, str.strip):
            contents = [change(m.content) for m in messages]
            if _MARK.sub(lambda m, c=contents: c[int(m[1])], skeleton) == actual:  # type: ignore[misc]
                return contents
        raise ModelError(
            "the model's chat template rewrites the text of a message",
            where=str(self.folder),
            fix="use a model whose template prints contents as they are",
        )

    def _template_spans(self, text: str) -> list[tuple[str, str]]:
        spans, at = [], 0
        for match in self._split.finditer(text) if self._control else ():
            spans += [(text[at : match.start()], "template"), (match[0], "control")]
            at = match.end()
        return [(t, r) for t, r in [*spans, (text[at:], "template")] if t]

    def _encode(self, text: str) -> list[int]:
        if self._unwritable and (lost := self._unwritable.intersection(text.encode("utf-8"))):
            char = next(c for c in text if lost.intersection(c.encode("utf-8")))
            raise DataError(
                f"unwritable: this model's tokenizer has no token for U+{ord(char):04X}",
                where=str(self.folder),
                fix="remove the character, or use another base",
            )
        return list(self._plain.encode(text, add_special_tokens=False).ids) if text else []

    def _run(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        shown = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return str(self._compiled.render(messages=shown, add_generation_prompt=generation_prompt, **self._special))
        except TemplateError as error:
            raise DataError(
                f"the model's chat template refuses the conversation: {error}",
                where=str(self.folder),
                fix="use roles and an order this model knows",
            ) from error

    def _control_ids(self, tree: dict[str, Any]) -> dict[str, int]:
        """Added tokens that steer the model: the special ones, and any other that the template itself writes."""
        added = {t["content"]: t for t in tree.get("added_tokens", ())}
        return {text: t["id"] for text, t in added.items() if t["special"] or text in self.template}

    def _stops(self) -> frozenset[int]:
        """The ids that end an answer: what the template puts behind one, and the model's end of text."""
        spans = self._spans(_PROBES[1], False)
        at = next(i for i, (_, role) in enumerate(spans) if role == "assistant")
        behind = next((self._control[t] for t, role in spans[at + 1 :] if role == "control"), None)
        eos = self._control.get(self._special["eos_token"])
        stops = frozenset(i for i in (behind, eos) if i is not None)
        if behind is None:
            raise ModelError(
                "the chat template puts no end token behind an answer, so the model could not learn to stop",
                where=str(self.folder),
                fix="use a model whose template ends each answer with a special token",
            )
        return stops

    def _hold_own_rendering(self) -> None:
        """Refuses a tokenizer or template that this renderer would not reproduce id by id."""
        for probe in _PROBES:
            messages = probe if self._takes_system() else tuple(m for m in probe if m.role != "system")
            whole, prompt = self.render(messages), self.prompt(messages[:-1])
            text = self._run(messages[:-1], True)
            if list(prompt) != self._whole.encode(text, add_special_tokens=False).ids:
                raise ModelError(
                    "this tokenizer joins text across control tokens, so exact rendering is impossible",
                    where=str(self.folder),
                    fix="use a model with a byte-level BPE tokenizer",
                )
            if list(whole.ids[: prompt.size]) != list(prompt):
                raise ModelError(
                    "the chat template shows a past answer differently from how it asks for one",
                    where=str(self.folder),
                    fix="use a model whose generation prompt is the beginning of its answers",
                )

    def _takes_system(self) -> bool:
        try:
            self._spans(_PROBES[0], False)
        except (DataError, ModelError):
            return False
        return True


def _tokenizer(tree: dict[str, Any], folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(tree))
    except Exception as error:
        raise ModelError(
            f"tokenizer.json is no tokenizer: {str(error)[:120]}",
            where=str(folder / "tokenizer.json"),
            fix="fetch the model again",
        ) from error


def _template(folder: Path, settings: dict[str, Any]) -> tuple[str, bool]:
    """The folder's chat template, or the plain one for a model that has none; and whether it is the model's own."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8"), True
    inline = settings.get("chat_template")
    return (inline, True) if isinstance(inline, str) else (PLAIN_TEMPLATE, False)


def _missing_bytes(tree: dict[str, Any]) -> frozenset[int]:
    """Bytes that a byte-level vocabulary lacks: a text that holds one would lose it without a word."""
    vocabulary = tree.get("model", {}).get("vocab")
    if '"ByteLevel"' not in json.dumps(tree.get("pre_tokenizer")) or not isinstance(vocabulary, dict):
        return frozenset()
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    symbols = {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(hidden)}
    return frozenset(b for b, symbol in symbols.items() if symbol not in vocabulary)


def _token(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else (value or "")


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
        if not isinstance(tree, dict):
            raise ValueError("not an object")
        return tree
    except FileNotFoundError as error:
        raise ModelError(f"{path.name} is missing", where=str(path), fix="use a complete model folder") from error
    except ValueError as error:
        raise ModelError(f"{path.name} is not JSON: {error}", where=str(path), fix="fetch the model again") from error


def _raise(message: str) -> None:
    raise TemplateError(message)
