"""Answers that are valid against a JSON Schema by construction: tokens that could not lead to one are never drawn.

The grammar engine is `llguidance`, the one that llama.cpp and vLLM build on, so an answer constrained here is one
constrained there. Answers are compact JSON, keys in the schema's order; answers from a reader are trained in that form.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metier.errors import ConfigError, needs_extra

_COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}


class Grammar:
    """A schema compiled for one tokenizer. Compiled once, matched by as many rows as wanted.

    `around` is what the model's tokens write before and behind an answer's text (`Renderer.around`).
    """

    def __init__(
        self,
        schema: dict[str, Any],
        tokenizer: Path,
        stop_ids: frozenset[int],
        around: tuple[str, str] = ("", ""),
    ) -> None:
        try:
            import llguidance
        except ModuleNotFoundError as error:
            raise needs_extra("llguidance", "train") from error
        self._library, self._stop_ids = llguidance, sorted(stop_ids)
        self._tokenizer = llguidance.LLTokenizer(tokenizer.read_text("utf-8"), eos_token=sorted(stop_ids))
        self._grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_COMPACT)
        if any(around):
            before, behind = map(json.dumps, around)
            compact = json.dumps(schema | {"x-guidance": _COMPACT | schema.get("x-guidance", {})})
            self._grammar = llguidance.LLMatcher.grammar_from_lark(
                f"start: {before} json {behind}\njson: %json {compact}"
            )
        if problem := llguidance.LLMatcher.validate_grammar(self._grammar, self._tokenizer):
            raise ConfigError(
                f"the schema cannot constrain answers: {problem.splitlines()[0]}",
                where="task.schema",
                fix="simplify the schema, or set prove.constrained to false",
            )

    def rows(self, count: int) -> Rows:
        matchers = [self._library.LLMatcher(self._tokenizer, self._grammar) for _ in range(count)]
        return Rows(matchers, self._stop_ids)


class Rows:
    """Where each of several answers stands in the grammar."""

    def __init__(self, matchers: Sequence[Any], stop_ids: Sequence[int]) -> None:
        self._matchers, self._stop_ids = matchers, list(stop_ids)

    def forbid(self, logits_BV: Tensor, rows: Sequence[int]) -> None:
        """Sets the logits of tokens that may not come next to minus infinity; `rows` names each line's answer."""
        for line, row in enumerate(rows):
            blocked = torch.from_numpy(~self._allowed(self._matchers[row], logits_BV.shape[1]))
            logits_BV[line].masked_fill_(blocked.to(logits_BV.device), -torch.inf)

    def _allowed(self, matcher: Any, vocabulary: int) -> np.ndarray:
        """(V,) bool: what may come next; once the answer is whole, only the tokens that end it."""
        allowed = np.zeros(vocabulary, dtype=bool)
        if matcher.is_stopped():
            allowed[self._stop_ids] = True
        else:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            allowed[: bits.size] = bits[:vocabulary]
        return allowed

    def take(self, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Moves each answer on by the token that was drawn for it."""
        for token, row in zip(tokens, rows, strict=True):
            matcher = self._matchers[row]
            if not matcher.is_stopped():
                taken = matcher.consume_token(token)
                assert taken, f"token {token} was drawn although the grammar forbids it: {matcher.get_error()}"
