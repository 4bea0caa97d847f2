"""Cached equals uncached, batched equals one by one, stop tokens stop, and sampling belongs to the row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import write_base
from metier.errors import ConfigError, DataError
from metier.models import generate, load, lora
from metier.models.generate import Decoding
from metier.models.schema import Grammar

CPU = torch.device("cpu")
NEVER: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def model(tiny: Path) -> torch.nn.Module:
    loaded = load.model(load.resolve(str(tiny), tiny), dtype=torch.float32, device=CPU)
    lora.attach(loaded, rank=4, alpha=8, targets="all-linear", seed=0)
    for number, parameter in enumerate(lora.parameters(loaded)):
        parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(number))
    return loaded


def prompts(count: int, shared: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    head = random.integers(3, 384, shared)
    return [np.concatenate([head, random.integers(3, 384, random.integers(1, 14))]) for _ in range(count)]


def run(model: torch.nn.Module, given: list[np.ndarray], decoding: Decoding, stop: frozenset[int] = NEVER) -> list:
    found = {i: a for batch in generate.generate(model, given, stop, decoding) for i, a in batch}
    assert sorted(found) == list(range(len(given)))
    return [(found[i].ids, found[i].finish) for i in range(len(given))]


@pytest.mark.parametrize("shared", [0, 20, 130])
def test_cached_equals_running_the_whole_text_anew(model: torch.nn.Module, tiny: Path, shared: int) -> None:
    untouched = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="eager").eval()
    given = prompts(4, shared)
    with lora.disabled(model):
        got = run(model, given, Decoding(8))
    for prompt, (ids, finish) in zip(given, got, strict=True):
        text = list(prompt)
        for token in ids:
            with torch.no_grad():
                assert int(untouched(torch.tensor([text])).logits[0, -1].argmax()) == token
            text.append(token)
        assert finish == "length" and len(ids) == 8


# Those whose decoding takes a path of its own: windows, soft-caps, partial and absent rotary, fused projections.
@pytest.mark.parametrize(
    "name",
    [
        "gemma2",
        "gemma3_text",
        "gpt_neox",
        "longrope",
        "mistral with a window",
        "olmo2",
        "phi3",
        "qwen3 with a window",
        "smollm3 with a window",
    ],
)
def test_every_family_decodes_as_if_anew_and_one_by_one(tmp_path: Path, name: str) -> None:
    folder = write_base(tmp_path, name)
    untouched = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    loaded = load.model(load.resolve(str(folder), folder), dtype=torch.float32, device=CPU)
    for shared in (0, 110):
        given = prompts(3, shared)
        got = run(loaded, given, Decoding(6))
        assert [run(loaded, [p], Decoding(6))[0] for p in given] == got
        for prompt, (ids, _) in zip(given, got, strict=True):
            with torch.no_grad():
                logits = untouched(torch.tensor([[*prompt, *ids]])).logits[0]
            assert logits[prompt.size - 1 : -1].argmax(-1).tolist() == ids


def test_a_prompt_over_the_context_is_refused(tmp_path: Path) -> None:
    """Beyond its original length LongRoPE would change the frequencies of every row of a batch."""
    folder = write_base(tmp_path, "longrope")
    loaded = load.model(load.resolve(str(folder), folder), dtype=torch.float32, device=CPU)
    assert load.context(loaded) == 140
    assert len(run(loaded, [np.arange(3, 137)], Decoding(6))[0][0]) == 6
    with pytest.raises(DataError, match=r"141 tokens.*context 140"):
        run(loaded, [np.arange(3, 138)], Decoding(6))


@pytest.mark.parametrize("decoding", [Decoding(10), Decoding(10, temperature=1.0, top_p=0.9, seed=4)])
def test_batched_equals_one_by_one(model: torch.nn.Module, decoding: Decoding, monkeypatch: pytest.MonkeyPatch) -> None:
    given = prompts(9, shared=12)
    stop = frozenset(range(3, 60))
    together = run(model, given, decoding, stop)
    monkeypatch.setattr(generate, "ROWS", 1)
    assert run(model, given, decoding, stop) == together
    assert {f for _, f in together} == {"stop", "length"}, "both endings occur, so rows leave the batch on the way"


def test_sampling_depends_on_the_seed_and_not_on_the_batch(model: torch.nn.Module) -> None:
    given = prompts(6)
    drawn = {seed: run(model, given, Decoding(8, temperature=1.5, seed=seed)) for seed in (1, 2)}
    assert drawn[1] != drawn[2] and drawn[1] == run(model, given, Decoding(8, temperature=1.5, seed=1))


def test_reading_in_parts_changes_nothing(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    given = prompts(9, shared=12)
    together = run(model, given, Decoding(6))
    monkeypatch.setattr(generate, "PROMPT_TOKENS", 20)
    assert run(model, given, Decoding(6)) == together
    monkeypatch.setattr(generate, "CACHE_TOKENS", 30)
    assert len(generate.batches(given, 6)) > 2 and run(model, given, Decoding(6)) == together


def test_a_tiny_nucleus_is_greedy(model: torch.nn.Module) -> None:
    given = prompts(5)
    assert run(model, given, Decoding(6, temperature=1.0, top_p=1e-6)) == run(model, given, Decoding(6))


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).repeat(4000, 1)
    draw = generate._Draw(Decoding(1, temperature=1.0, top_p=0.75, seed=0), range(4000))
    counts = torch.bincount(draw(logits, range(4000), 0), minlength=3) / 4000
    # nucleus .75 keeps .5 and .3, renormalised to .625 and .375; 4,000 draws have a standard error of .0077
    assert counts.tolist() == pytest.approx([0.625, 0.375, 0.0], abs=0.03)


def test_skipping_done_batches_leaves_the_others_as_they_were(model: torch.nn.Module) -> None:
    given = prompts(150)
    groups = generate.batches(given, 3)
    assert len(groups) > 1
    whole = run(model, given, Decoding(3))
    rest = [
        (i, (a.ids, a.finish))
        for batch in generate.generate(model, given, NEVER, Decoding(3), skip=frozenset(groups[0]))
        for i, a in batch
    ]
    assert sorted(i for i, _ in rest) == sorted(i for g in groups[1:] for i in g)
    assert all(whole[i] == answer for i, answer in rest)


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "bc"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_constrained_answer_that_stops_is_valid(model: torch.nn.Module, renderer, temperature: float) -> None:
    """A random model writes nothing but valid answers, batched as one by one."""
    from jsonschema import Draft202012Validator

    grammar = Grammar(SCHEMA, renderer.folder / "tokenizer.json", renderer.stop_ids)
    given = prompts(12, shared=9)
    decoding = Decoding(40, temperature=temperature, seed=2)

    def answers(some: list[np.ndarray]) -> list[tuple[list[int], str]]:
        batches = generate.generate(model, some, renderer.stop_ids, decoding, grammar=grammar)
        found = {i: a for batch in batches for i, a in batch}
        return [(found[i].ids, found[i].finish) for i in range(len(some))]

    together = answers(given)
    assert [f for _, f in together] == ["stop"] * len(given)
    for ids, _ in together:
        Draft202012Validator(SCHEMA).validate(json.loads(renderer.parse(ids)))
    if temperature == 0:
        assert [answers([p])[0] for p in given] == together


def test_a_schema_that_cannot_constrain_is_refused(renderer) -> None:
    with pytest.raises(ConfigError, match="cannot constrain"):
        Grammar({"type": "string", "pattern": "(?=x)y"}, renderer.folder / "tokenizer.json", renderer.stop_ids)
