"""The engine against the untouched model: logits, gradients, adapters, and PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import VARIANTS, write_base
from metier.errors import ConfigError, ModelError
from metier.models import attention, head, load, lora, tensors
from metier.models.attention import Cache, Prefix, Rows, Scoring, Step

CPU = torch.device("cpu")


def ours(folder: Path) -> torch.nn.Module:
    return load.model(load.resolve(str(folder), folder), dtype=torch.float32, device=CPU)


def hidden(model: torch.nn.Module, prefix: list[int], rows: list[list[int]]) -> torch.Tensor:
    layout = Rows([len(r) for r in rows], prefix=len(prefix), device=CPU)
    return attention.hidden_states(model, torch.tensor([*prefix, *(i for r in rows for i in r)]), layout)


BASES = (*load.ARCHITECTURES, *VARIANTS)
ROWS = [[5, 9, 11, 30, 7], [8, 21], [100, 101, 102, 103, 104, 105, 106]]
PREFIX = [3, 4, 250]


@pytest.mark.parametrize("name", BASES)
def test_packed_rows_behind_a_prefix_equal_the_untouched_model(tmp_path: Path, name: str) -> None:
    folder = write_base(tmp_path, name)
    untouched = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model = ours(folder)
    with torch.no_grad():
        got = head.logits(model, hidden(model, PREFIX, ROWS))
        at = len(PREFIX)
        for row in ROWS:
            expected = untouched(torch.tensor([PREFIX + row])).logits[0]
            torch.testing.assert_close(got[at : at + len(row)], expected[len(PREFIX) :], rtol=1e-4, atol=1e-5)
            at += len(row)


@pytest.mark.parametrize("name", BASES)
def test_adapter_gradients_equal_plain_autograd_through_the_untouched_model(tmp_path: Path, name: str) -> None:
    """The oracle is PEFT on the untouched model, row by row, with the loss written out."""
    peft = pytest.importorskip("peft")
    folder = write_base(tmp_path, name)
    model = ours(folder)
    lora.attach(model, rank=4, alpha=8, targets="all-linear", seed=3)
    for number, parameter in enumerate(lora.parameters(model)):
        generator = torch.Generator().manual_seed(number)
        parameter.data.normal_(0, 0.05, generator=generator)
    lora.save(model, tmp_path / "adapter", base=str(folder))
    untouched = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    oracle = peft.PeftModel.from_pretrained(untouched, tmp_path / "adapter", is_trainable=True).eval()

    total = 0.0
    for row in ROWS:
        ids = torch.tensor([PREFIX + row])
        logprobs = oracle(ids).logits[0].log_softmax(-1)
        total = total - logprobs[len(PREFIX) : -1].gather(1, ids[0, len(PREFIX) + 1 :, None]).sum()
    total.backward()

    states = hidden(model, PREFIX, ROWS)
    starts = np.cumsum([len(PREFIX), *(len(r) for r in ROWS)])
    predict = torch.cat([torch.arange(s, s + len(r) - 1) for s, r in zip(starts, ROWS, strict=False)])
    targets = torch.tensor([i for r in ROWS for i in r[1:]])
    weight = model.get_output_embeddings().weight
    loss = -head.logprobs(states[predict], weight, targets, softcap=head.softcap(model)).sum()
    loss.backward()

    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    expected = {
        n.replace(".default", ""): p.grad for n, p in oracle.named_parameters() if "lora_" in n and p.grad is not None
    }
    grads = dict(zip(lora.state(model), [p.grad for p in lora.parameters(model)], strict=True))
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=2e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "mistral with a window"])
def test_long_rows_in_blocks_equal_short_ones(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(write_base(tmp_path, name))
    lora.attach(model, rank=2, alpha=4, targets="all-linear", seed=0)
    for parameter in lora.parameters(model):
        parameter.data.fill_(0.01)

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        out = hidden(model, PREFIX, ROWS)
        grads = torch.autograd.grad(out.square().sum(), lora.parameters(model))
        return out.detach(), list(grads)

    padded = run()
    monkeypatch.setattr(attention, "LONG", 1)
    monkeypatch.setattr(attention, "BLOCK", 3)
    long = run()
    torch.testing.assert_close(long[0], padded[0], rtol=1e-4, atol=1e-5)
    for one, other in zip(long[1], padded[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scoring", [Scoring(0.5), Scoring(0.5, softcap=1.5, window=2)])
def test_attention_gradient_by_finite_differences(scoring: Scoring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "GRAIN", 8)
    generator = torch.Generator().manual_seed(1)
    rows = Rows([3, 2], prefix=2, device=CPU)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(attention.GRAIN, heads, 4, generator=generator, dtype=torch.float64).requires_grad_()

    # The kernel's softmax is float32 by design; a coarse step keeps its rounding out of the quotient.
    assert torch.autograd.gradcheck(
        lambda q, k, v: rows.attend(0, q, k, v, scoring), (draw(4), draw(2), draw(2)), eps=1e-2, atol=2e-3, rtol=1e-2
    )


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "qwen3 with a window", "phi3"])
@pytest.mark.parametrize("shared", [0, 100])
def test_states_from_the_cache_equal_the_untouched_model(tmp_path: Path, name: str, shared: int) -> None:
    """Prefix, prompts and three steps through the cache: logits, not only their largest, as of the whole text anew."""
    folder = write_base(tmp_path, name)
    untouched = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model, cache = ours(folder), Cache()
    prefix = [3 + (i * 37) % 380 for i in range(shared)]
    lengths, texts = [len(r) for r in ROWS], [list(r) for r in ROWS]
    with torch.inference_mode():
        if prefix:
            attention.hidden_states(model, torch.tensor(prefix), Prefix(shared, cache, CPU))
        cache.open_rows(len(ROWS), max(lengths) + 3)
        rows = Rows(lengths, prefix=0, device=CPU, cache=cache)
        states = attention.hidden_states(model, torch.tensor([i for r in ROWS for i in r]), rows)
        states = states[torch.tensor(lengths).cumsum(0) - 1]
        for step in range(4):
            for text, got in zip(texts, head.logits(model, states), strict=True):
                expected = untouched(torch.tensor([prefix + text])).logits[0, -1]
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
            tokens = [11 + step, 40, 77 + step]
            filled = torch.tensor([len(t) for t in texts])
            if step < 3:
                states = attention.hidden_states(model, torch.tensor(tokens), Step(cache, filled))
                texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]


def test_a_window_holds_the_token_itself_and_those_just_before_it() -> None:
    """With equal scores a token's answer is the mean of the values it sees: 2 prefix tokens, then a row of 3."""
    values, nothing = torch.zeros(attention.GRAIN, 1, 1), torch.zeros(attention.GRAIN, 1, 1)
    values[:5, 0, 0] = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    for window, expected in (
        (2, [1, 1.5, 3, 6, 12]),
        (3, [1, 1.5, 7 / 3, 14 / 3, 28 / 3]),
        (9, [1, 1.5, 7 / 3, 3.75, 6.2]),
    ):
        got = Rows([3], prefix=2, device=CPU).attend(0, nothing, nothing, values, Scoring(1.0, window=window))
        torch.testing.assert_close(got[:5, 0, 0], torch.tensor(expected))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_head_by_hand_and_in_chunks(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(9, 6, generator=generator).requires_grad_()
    weight, targets = torch.randn(11, 6, generator=generator), torch.arange(9)
    logits = states @ weight.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = logits.log_softmax(-1)[torch.arange(9), targets]
    slope = torch.randn(9, generator=generator)
    expected_grad = torch.autograd.grad((expected * slope).sum(), states)[0]
    monkeypatch.setattr(head, "CHUNK", 4)
    got = head.logprobs(states, weight, targets, softcap=softcap)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad((got * slope).sum(), states)[0], expected_grad)


def test_a_fresh_adapter_is_the_base_model(tiny: Path) -> None:
    model = ours(tiny)
    with torch.no_grad():
        before = hidden(model, PREFIX, ROWS)
        lora.attach(model, rank=4, alpha=8, targets="all-linear", seed=0)
        assert torch.equal(hidden(model, PREFIX, ROWS), before)


def test_a_switched_off_adapter_is_the_base_model(tiny: Path) -> None:
    model = ours(tiny)
    with torch.no_grad():
        before = hidden(model, PREFIX, ROWS)
        lora.attach(model, rank=4, alpha=8, targets="all-linear", seed=0)
        for parameter in lora.parameters(model):
            parameter.fill_(0.3)
        assert not torch.allclose(hidden(model, PREFIX, ROWS), before)
        with lora.disabled(model):
            assert torch.equal(hidden(model, PREFIX, ROWS), before)


def test_saved_adapters_are_the_same_bytes_and_load_in_peft(tiny: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = ours(tiny)
    lora.attach(model, rank=4, alpha=8, targets=["q_proj", "down_proj"], seed=0)
    for parameter in lora.parameters(model):
        parameter.data.uniform_(-0.1, 0.1)
    for name in ("one", "two"):
        lora.save(model, tmp_path / name, base=str(tiny))
    assert (tmp_path / "one" / lora.WEIGHTS).read_bytes() == (tmp_path / "two" / lora.WEIGHTS).read_bytes()

    untouched = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(untouched, tmp_path / "one").eval()
    with torch.no_grad():
        got = model.get_output_embeddings()(hidden(model, [], [ROWS[2]]))
        torch.testing.assert_close(got, theirs(torch.tensor([ROWS[2]])).logits[0], rtol=1e-4, atol=1e-5)

    again = ours(tiny)
    lora.load(again, tmp_path / "one")
    assert all(torch.equal(a, b) for a, b in zip(lora.state(again).values(), lora.state(model).values(), strict=True))


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "nan", "truncated", "other-rank", "dora", "bin-only"])
def test_adapters_that_do_not_fit_are_refused(tiny: Path, tmp_path: Path, damage: str) -> None:
    import json

    model = ours(tiny)
    lora.attach(model, rank=4, alpha=8, targets=["q_proj"], seed=0)
    lora.save(model, tmp_path, base=str(tiny))
    weights, facts = tmp_path / lora.WEIGHTS, json.loads((tmp_path / lora.SETTINGS).read_text())
    found = tensors.read(weights)
    first = next(iter(found))
    if damage == "missing":
        del found[first]
    elif damage == "extra":
        found["stranger"] = torch.zeros(1)
    elif damage == "shape":
        found[first] = found[first][:, :-1]
    elif damage == "nan":
        found[first][0, 0] = torch.nan
    weights.write_bytes(b"".join(tensors.pieces(found)))
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "bin-only":
        weights.rename(tmp_path / "adapter_model.bin")
    facts |= {"other-rank": {"r": 3}, "dora": {"use_dora": True}}.get(damage, {})
    (tmp_path / lora.SETTINGS).write_text(json.dumps(facts))
    with pytest.raises(ModelError) as caught:
        lora.load(ours(tiny), tmp_path)
    assert caught.value.fix and str(tmp_path) in caught.value.where


def test_a_target_that_is_not_there_is_refused_with_the_nearest(tiny: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        lora.attach(ours(tiny), rank=4, alpha=8, targets=["q_prj"], seed=0)
    assert "q_proj" in caught.value.fix
    with pytest.raises(ConfigError, match="rank 99"):
        lora.attach(ours(tiny), rank=99, alpha=8, targets="all-linear", seed=0)
