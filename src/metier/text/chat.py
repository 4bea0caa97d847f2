"""The one renderer: training, proof, rollouts and serving turn messages into token ids here and nowhere else.

The model's own chat template is rendered with placeholders where the contents belong, and the contents are put in
afterwards, as text that can never become a control token: `<|im_end|>` typed by a user is six ordinary tokens. Text
between two control tokens is tokenised in one piece, as the model's own tokenizer would; an answer starts a piece of
its own, so that the ids of a prompt are always the beginning of the ids of the whole conversation.

Three traits of other families are followed. Where a template knows no system role, a system text stands at the head of
the next user text. Where it puts blanks between what asks for an answer and the answer, or an answer and its end, the
model learns to write them, and `parse` takes them off. A tokenizer in the manner of SentencePiece may put a blank
before a text: before each that follows a control token, but not before a piece inside one.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template
from jinja2.exceptions import TemplateError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from metier.errors import DataError, ModelError
from metier.records import Message

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{{ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
}
# Models that were taught to chat name the end of a turn as their end token; these end a text.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_MARK = re.compile("\ue000(\\d+)\ue001")
_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")  # marks an answer, and prints nothing
_BLANKS = re.compile(r"[^\S\x1c-\x1f]*")  # what the `tokenizers` library takes for white space
_TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.rstrip)
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
    """Messages to ids for one model folder: its `tokenizer.json`, its template or the given one, its special tokens.

    `system_role` says whether its template takes system messages, `around` what its tokens write before and behind the
    text of an answer (blanks, or nothing).
    """

    def __init__(self, folder: Path, template: str | None = None) -> None:
        self.folder = folder
        tree = _json(folder / "tokenizer.json")
        settings = _json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        self.template, self.own_template = (template, True) if template else _template(folder, settings)
        self._special = {k: _token(settings.get(k)) for k in ("bos_token", "eos_token", "pad_token")}
        self._control = self._control_ids(tree)
        self._split = re.compile("|".join(re.escape(t) for t in sorted(self._control, key=len, reverse=True)))
        self._control_of = frozenset(self._control.values())
        self._greedy = {t["content"] for t in tree.get("added_tokens", ()) if t.get("rstrip")} & {*self._control}
        self._whole = _tokenizer(tree, folder)
        kept = [t for t in tree.get("added_tokens", ()) if t["content"] not in self._control]
        plain = {**tree, "added_tokens": kept, "post_processor": None}
        self._plain = _tokenizer(plain, folder)
        self._inside, self._decoder = self._plain, self._whole
        if _flowing(tree) != tree:
            self._inside, self._decoder = (_tokenizer(_flowing(t), folder) for t in (plain, tree))
        first_only = '"prepend_scheme": "first"' in json.dumps(tree.get("pre_tokenizer"))
        self._behind_control = self._inside if first_only else self._plain
        self._unwritable = _missing_bytes(tree)
        unknown = tree.get("model", {}).get("unk_token")
        self._unknown = self._whole.token_to_id(unknown) if isinstance(unknown, str) else None
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        self._environment.globals["raise_exception"] = _raise
        self._environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        self._compiled = self._compile()
        self.system_role = self._takes_system()
        self._lead: list[tuple[str, str]] = []
        self._blank, self.around = "", ("", "")
        self._surround_answers()
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

    def document(self, text: str) -> np.ndarray:
        """Ids (T,) of a raw text between its marks: what the tokenizer puts before a text, and the end of a text.

        A tokenizer that puts nothing before gives the end mark there, as when texts follow one another.
        """
        end = next((self._control[t] for t in (*END_OF_TEXT, self._special["eos_token"]) if t in self._control), None)
        if end is None:
            raise ModelError(
                "the tokenizer has no token that ends a text",
                where=str(self.folder),
                fix="use a base whose tokenizer_config.json names an eos_token among its special tokens",
            )
        first = self._whole.encode("a", add_special_tokens=True).ids[0]
        start = first if first in self._control.values() else end
        return np.array([start, *self._encode(text, self._plain), end], dtype=np.int64)

    def parse(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, without the token that ended it; NUL, which no record may hold, as U+FFFD."""
        kept = [i for i in ids if i not in self.stop_ids]
        text = str(self._decoder.decode(kept, skip_special_tokens=False)).replace("\0", "\ufffd")
        return text.removeprefix(self.around[0]).removesuffix(self.around[1])

    def count(self, text: str) -> int:
        """Tokens of a text as content."""
        return len(self._plain.encode(text, add_special_tokens=False).ids)

    def _pieces(self, messages: Sequence[Message], *, generation_prompt: bool) -> list[tuple[list[int], bool]]:
        """(ids, supervised) in order; an answer and what ends it are supervised."""
        pieces: list[tuple[list[int], bool]] = []
        segment: list[tuple[str, str]] = []
        control, after_answer = None, False
        spans = self._spans(messages, generation_prompt)
        for text, role in [*spans, *(self._lead if generation_prompt else ())]:
            if role != "control":
                segment.append((text, role))
                continue
            pieces += self._segment(segment, control, ended=True)
            after_answer = any(r == "assistant" for _, r in segment)
            pieces.append(([self._control[text]], after_answer))
            segment, control = [], text
        pieces += self._segment(segment, control, ended=False)
        return pieces

    def _segment(
        self, spans: Sequence[tuple[str, str]], control: str | None, *, ended: bool
    ) -> list[tuple[list[int], bool]]:
        """(ids, supervised) of the text behind a control token, or behind nothing, up to the next or to the end."""
        texts: list[tuple[str, bool]] = [("", False)]
        for text, role in spans:
            if role == "assistant":
                earlier = texts.pop()[0]
                blank = self._blank if earlier.endswith(self._blank) else ""
                texts += [(earlier.removesuffix(blank), False), (blank + text, True), ("", False)]
            else:
                texts[-1] = (texts[-1][0] + text, False)
        if ended and len(texts) > 1:
            behind, answer = texts.pop()[0], texts.pop()[0]
            texts.append((answer + behind, True))
        if control in self._greedy:
            texts[0] = (_BLANKS.sub("", texts[0][0], count=1), False)
        tokenizer = self._plain if control is None else self._behind_control
        pieces = []
        for text, learnt in texts:
            if text:
                pieces.append((self._encode(text, tokenizer), learnt))
                tokenizer = self._inside
        return pieces

    def _spans(self, messages: Sequence[Message], generation_prompt: bool) -> list[tuple[str, str]]:
        """(text, role) in order: contents by their message's role, control tokens, and the template's own text."""
        messages = messages if self.system_role else self._folded(messages)
        skeleton = self._run([Message(m.role, f"\ue000{i}\ue001") for i, m in enumerate(messages)], generation_prompt)
        parts = _MARK.split(skeleton)
        if [int(i) for i in parts[1::2]] != list(range(len(messages))):
            roles = ", ".join(m.role for m in messages)
            raise ModelError(
                f"the model's chat template drops or moves a message of ({roles})",
                where=str(self.folder),
                fix="use roles this model knows",
            )
        contents = self._contents(messages, skeleton, generation_prompt)
        spans: list[tuple[str, str]] = []
        for at, part in enumerate(parts):
            if at % 2:
                spans.append((contents[int(part)], messages[int(part)].role))
            else:
                spans += self._template_spans(part)
        return spans

    def _folded(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation without system messages: each stands at the head of the next user text instead."""
        folded: list[Message] = []
        above: list[str] = []
        for message in messages:
            if message.role == "system":
                above.append(message.content)
            elif message.role == "user" and above:
                folded.append(Message("user", "\n\n".join([*above, message.content])))
                above = []
            else:
                folded.append(message)
        if above:
            raise DataError(
                "this model has no system role, and no user text follows the system text",
                where=str(self.folder),
                fix="put a user message behind it, or use another base",
            )
        return folded

    def _contents(self, messages: Sequence[Message], skeleton: str, generation_prompt: bool) -> list[str]:
        """The contents as the template prints them: as they are, or trimmed in one way for each role."""
        actual = self._run(messages, generation_prompt)
        roles = list(dict.fromkeys(m.role for m in messages))
        for trims in itertools.product(_TRIMS, repeat=len(roles)):
            contents = [trims[roles.index(m.role)](m.content) for m in messages]
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

    def _encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        ids = list(tokenizer.encode(text, add_special_tokens=False).ids)
        lost = self._unwritable.intersection(text.encode("utf-8")) if self._unwritable else ()
        if typed := self._control_of.intersection(ids) - {self._unknown}:
            raise DataError(
                f"unwritable: this tokenizer takes text for its control token {self._whole.id_to_token(min(typed))}",
                where=str(self.folder),
                fix="remove it from the text, or use another base",
            )
        if lost or self._unknown in ids:
            char = next((c for c in text if self._loses(c)), text[0])
            raise DataError(
                f"unwritable: this model's tokenizer has no token for U+{ord(char):04X}",
                where=str(self.folder),
                fix="remove the character, or use another base",
            )
        return ids

    def _loses(self, char: str) -> bool:
        unknown = self._unknown in self._inside.encode(char, add_special_tokens=False).ids
        return unknown or bool(self._unwritable.intersection(char.encode("utf-8")))

    def _compile(self) -> Template:
        marked = _GENERATION.sub(lambda m: f"{m[1]}{'endif' if m[2] else 'if true'}{m[3]}", self.template)
        try:
            return self._environment.from_string(marked)
        except TemplateError as error:
            raise ModelError(
                f"the chat template is no template: {error}", where=str(self.folder), fix="fetch the model again"
            ) from error

    def _run(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        shown = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return str(self._compiled.render(messages=shown, add_generation_prompt=generation_prompt, **self._special))
        except UndefinedError as error:
            raise ModelError(
                f"the model's chat template needs more than a conversation: {error}",
                where=str(self.folder),
                fix="use a base whose template needs nothing else; one that prints the date is another every day",
            ) from error
        except TemplateError as error:
            raise DataError(
                f"the model's chat template refuses the conversation: {error}",
                where=str(self.folder),
                fix="use roles and an order this model knows",
            ) from error

    def _control_ids(self, tree: dict[str, Any]) -> dict[str, int]:
        """Added tokens that steer the model: the special ones, and any other that the template itself writes."""
        added = {t["content"]: t for t in tree.get("added_tokens", ())}
        return {x: t["id"] for x, t in added.items() if t["special"] or (x.strip() and x in self.template)}

    def _surround_answers(self) -> None:
        """Learns what the template puts between its request for an answer and the answer, and behind an answer.

        Blanks before an answer are learnt with it; more than blanks (an empty thought) is part of the request instead.
        """
        asked, spans = self._spans(_PROBES[1][:-1], True), self._spans(_PROBES[1], False)
        at = next(i for i, (_, role) in enumerate(spans) if role == "assistant")
        request, before = ("".join(text for text, _ in some) for some in (asked, spans[:at]))
        if not before.startswith(request):
            raise ModelError(
                "the chat template shows a past answer differently from how it asks for one",
                where=str(self.folder),
                fix="use a model whose generation prompt is the beginning of its answers",
            )
        lead = before.removeprefix(request)
        if lead.strip():
            self._lead = self._template_spans(lead)
        else:
            self._blank = lead
        behind = itertools.takewhile(lambda span: span[1] != "control", spans[at + 1 :])
        ids = next(piece for piece, learnt in self._pieces(_PROBES[1], generation_prompt=False) if learnt)
        written = str(self._decoder.decode(ids, skip_special_tokens=False))
        before, found, _ = written.partition(_PROBES[1][-1].content)
        self.around = before if found else "", "".join(text for text, _ in behind)

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
                fix="use a template that ends each answer with a special token of the vocabulary "
                f"({', '.join(sorted(self._control)[:8]) or 'it has none'}), or no task.template for the plain one",
            )
        return stops

    def _hold_own_rendering(self) -> None:
        """Refuses a tokenizer or template that this renderer would not reproduce id by id."""
        lead = "".join(text for text, _ in self._lead)
        for probe in _PROBES:
            messages = probe if self.system_role else self._folded(probe)
            whole, prompt = self.render(messages), self.prompt(messages[:-1])
            asked, shown = self._run(messages[:-1], True) + lead, self._run(messages, False)
            for ids, text in ((prompt, asked), (whole.ids, shown)):
                if list(ids) != self._whole.encode(text, add_special_tokens=False).ids:
                    raise ModelError(
                        "this tokenizer joins text across control tokens, so exact rendering is impossible",
                        where=str(self.folder),
                        fix="use a model with another tokenizer, such as a byte-level BPE",
                    )
            if self.parse(whole.ids[whole.supervised]) != messages[-1].content:
                raise ModelError(
                    "this tokenizer does not give back the text of an answer",
                    where=str(self.folder),
                    fix="use a model with another tokenizer, such as a byte-level BPE",
                )
            if list(whole.ids[: prompt.size]) != list(prompt):
                raise ModelError(
                    "the chat template shows a past answer differently from how it asks for one",
                    where=str(self.folder),
                    fix="use a model whose generation prompt is the beginning of its answers",
                )

    def _takes_system(self) -> bool:
        self.system_role = True
        try:
            self._spans(_PROBES[0], False)
        except (DataError, ModelError):
            return False
        return True


def of_run(folder: Path, data: Path) -> Renderer:
    """The renderer of a run: with the template that its data set holds, or that of the base in `folder`."""
    given = data / TEMPLATE_FILE
    return Renderer(folder, given.read_text("utf-8") if given.is_file() else None)


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


def _flowing(part: Any) -> Any:
    """A tokenizer's description without the blank that it puts before a text, and takes off again in decoding."""
    if isinstance(part, list):
        return [kept for kept in map(_flowing, part) if kept is not None]
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "Prepend" or (kind == "Strip" and part.get("content") == " "):
        return None
    flowing = dict(part)
    if kind == "Metaspace":
        flowing["prepend_scheme"] = "never"
    if kind == "ByteLevel":
        flowing["add_prefix_space"] = False
    for name in ("normalizer", "pre_tokenizer", "decoder", "normalizers", "pretokenizers", "decoders"):
        if name in part:
            flowing[name] = _flowing(part[name])
    return flowing


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
