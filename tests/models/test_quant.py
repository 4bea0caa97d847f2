"""Weights in few bits: levels and codes by hand, the library of the paper's authors as the oracle, and a quantised
model against a plain one that holds the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import write_model
from metier.errors import ConfigError
from metier.models import load, lora, quant, recompute, whole
from metier.models.linear import Lora, LoraLinear, QuantisedLinear
from metier.text import batches
from metier.text.batches import Row
from metier.training import loop, plan

CPU = torch.device("cpu")
KINDS = ("nf4", "int8")


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_the_levels_are_the_quantiles_they_are_named_for() -> None:
    """Dettmers et al. 2023, §3: eight negative and nine positive quantiles, one zero between, scaled to one."""
    from scipy.stats import norm

    tail = 1 - (1 / 30 + 1 / 32) / 2  # half a quantile is left out at each end, of 15 and of 16
    negative = -norm.ppf(np.linspace(tail, 0.5, 8)[:-1])
    positive = norm.ppf(np.linspace(tail, 0.5, 9)[:-1])[::-1]
    expected = np.concatenate([negative, [0.0], positive]) / norm.ppf(tail)
    assert list(expected) == pytest.approx(quant.LEVELS, abs=2e-6)


def test_a_block_by_hand() -> None:
    weight = torch.zeros(1, 64)
    weight[0, :5] = torch.tensor([2.0, -2.0, 0.16, 1.0, -1.0])
    kept = quant.quantised(weight, "nf4")
    # over 2: 1 → level 15, −1 → 0, .08 → 8 (.0796), .5 → 12 (.4407; .5016 is the middle), −.5 → 2 (−.5251); 0 → 7
    assert kept.codes[:3].tolist() == [15 << 4 | 0, 8 << 4 | 12, 2 << 4 | 7] and set(kept.codes[3:].tolist()) == {0x77}
    # one block alone is its own mean: nothing is left to quantise, and the scale comes back exactly
    full = kept.full(torch.float32)
    levels = [1.0, -1.0, quant.LEVELS[8], quant.LEVELS[12], quant.LEVELS[2]]
    assert full[0, :5].tolist() == pytest.approx([2 * level for level in levels]) and not full[0, 5:].any()


def test_scales_by_hand() -> None:
    """Largest magnitudes 1, 2, 3: mean 2, the rest −1, 0, 1 over 1; the code ends in 1 but begins a half step late."""
    weight = torch.zeros(3, 64)
    weight[:, 0] = torch.tensor([1.0, 2.0, 3.0])
    kept = quant.quantised(weight, "nf4")
    assert kept.mean.item() == 2 and kept.scale_scales_M.tolist() == [1.0]
    lowest = -(0.1 + 0.9 * 63.5 / 64)  # the middle of the last of 64 steps between .1 and 1
    assert kept.full(torch.float32)[:, 0].tolist() == pytest.approx([2 + lowest, 2.0, 3.0])


def test_int8_by_hand() -> None:
    weight = torch.tensor([[1.27, -0.635, 0.0, 0.014], [0.0, 0.0, 0.0, 0.0]])
    kept = quant.quantised(weight, "int8")
    # scale .01: 127, −63.5 → −64 (half to even), 0, 1.4 → 1
    assert kept.codes_OI.tolist() == [[127, -64, 0, 1], [0, 0, 0, 0]]
    assert kept.full(torch.float32)[0].tolist() == pytest.approx([1.27, -0.64, 0.0, 0.01])


def test_the_dynamic_code_has_256_levels_dense_around_zero() -> None:
    code = quant.dynamic_code(CPU)
    assert code.shape == (256,) and code[-1] == 1 and (code[1:] > code[:-1]).all()
    assert code[127].item() == 0 and code[128].item() == pytest.approx(0.55e-6)  # the middle of .1 and 1, × 10⁻⁶


def test_the_nearest_level_is_that_of_a_search() -> None:
    levels = torch.tensor(quant.LEVELS)
    middles = (levels[1:] + levels[:-1]) / 2
    edges = torch.arange(-16, 17) / 16
    near = [t.nextafter(torch.tensor(to)) for t in (middles, edges[1:-1]) for to in (-2.0, 2.0)]
    numbers = torch.cat([drawn(1 << 16).clamp(-1, 1), levels, middles, edges, *near])
    assert torch.equal(quant._nearest(numbers).int(), torch.bucketize(numbers, middles, out_int32=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 64), (130, 96), (5, 33_000)])
def test_a_full_weight_is_near_and_the_same_in_any_pieces(
    kind: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = drawn(*shape)
    kept = quant.quantised(weight, kind)
    full = kept.full(torch.float32)
    assert full.shape == shape
    # half the widest gap between levels of a block's largest magnitude, and half a step of 127
    widest = {"nf4": 0.16, "int8": 0.5 / 127}[kind] * weight.abs().max()
    assert (full - weight).abs().max() <= widest
    assert torch.equal(kept.full(torch.bfloat16), full.bfloat16()), "rounded once"
    monkeypatch.setitem(quant.PIECE, "cpu", 3)
    again = quant.quantised(weight, kind)
    assert torch.equal(again.full(torch.float32), full) and torch.equal(kept.full(torch.float32), full)


@pytest.mark.parametrize("kind", KINDS)
def test_lent_weights_are_full_ones_in_as_few_buffers_as_are_lent_at_a_time(kind: str) -> None:
    scratch = quant.Scratch()
    small, large = (quant.quantised(drawn(*shape), kind, scratch) for shape in ((8, 64), (16, 128)))
    with quant.lent(small, torch.float32) as one, quant.lent(large, torch.float32) as two:
        assert torch.equal(one, small.full(torch.float32)) and torch.equal(two, large.full(torch.float32))
    places = set()
    for weight in (large, small, large):
        with quant.lent(weight, torch.float32) as full:
            places.add(full.data_ptr())
            assert torch.equal(full, weight.full(torch.float32))
    assert len(places) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_weights_side_by_side_are_full_ones_below_each_other(kind: str) -> None:
    parts = [quant.quantised(drawn(rows, 96), kind) for rows in (5, 1, 7)]
    joined = quant.SideBySide.of(parts)
    assert joined.shape == (13, 96) and joined.nbytes == sum(p.nbytes for p in parts)
    assert torch.equal(joined.full(torch.bfloat16), torch.cat([p.full(torch.bfloat16) for p in parts]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_knows_the_bits_of_a_weight(kind: str) -> None:
    kept = quant.quantised(drawn(512, 4096), kind)
    assert kept.nbytes * 8 / kept.shape.numel() == pytest.approx(quant.BITS[kind], rel=2e-3)
    assert plan.QUANTISED_BYTES[kind] * 8 == pytest.approx(quant.BITS[kind], rel=1e-3)


def test_nf4_equals_the_library_of_its_authors() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = drawn(256, 512, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(
        weight, blocksize=quant.BLOCK, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8
    )
    kept = quant.quantised(weight, "nf4")
    assert state.code.tolist() == pytest.approx(quant.LEVELS)
    assert torch.allclose(state.state2.code, quant.dynamic_code(CPU), atol=1e-7)
    assert (packed.view(-1) != kept.codes).float().mean() < 1e-4, "ties may fall to either side"
    assert (state.absmax != kept.scale_codes_N).float().mean() < 1e-2
    theirs = functional.dequantize_4bit(packed, state).float()
    torch.testing.assert_close(kept.full(torch.float32), theirs, rtol=2e-2, atol=1e-3)


def rows() -> list[Row]:
    random = np.random.default_rng(1)
    made = []
    for number in range(4):
        ids = np.concatenate([[3, 4, 5], random.integers(6, 384, random.integers(4, 30))])
        supervised = np.arange(ids.size) >= ids.size - 3
        made.append(Row(f"r{number}", ids, supervised))
    return made


def opened(folder: Path, quantize: str = "none", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return load.model(load.resolve(str(folder), folder), dtype=dtype, device=CPU, quantize=quantize)  # type: ignore[arg-type]


def fitted(model: torch.nn.Module, targets: str | list[str] = "all-linear") -> tuple[float, list[torch.Tensor]]:
    """The loss of a batch and its gradients, with an adapter that does something."""
    lora.attach(model, rank=4, alpha=8, targets=targets, seed=3)
    for number, parameter in enumerate(lora.parameters(model)):
        parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(number))
    loss = -loop.logprobs(model, batches.layout(rows(), 3)).mean()
    loss.backward()
    return loss.item(), [p.grad for p in lora.parameters(model)]


def dequantised(folder: Path, kind: str, dtype: torch.dtype) -> torch.nn.Module:
    """A plain model that holds the numbers of a quantised one."""
    few, plain = opened(folder, kind, dtype), opened(folder, "none", dtype)
    for name, part in few.named_modules():
        if isinstance(part, QuantisedLinear):
            plain.get_submodule(name).weight.data = part.weight.full(dtype)
    return plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("architecture", "targets"),
    [(name, "all-linear") for name in ("llama", "qwen2", "gemma3_text", "gpt_neox", "phi3")]
    + [("llama", ["q_proj", "down_proj"])],
)
def test_loss_and_gradients_equal_the_dequantised_models(
    tmp_path: Path, architecture: str, kind: str, targets: str | list[str]
) -> None:
    folder = write_model(tmp_path, architecture)
    loss, grads = fitted(opened(folder, kind), targets)
    expected, expected_grads = fitted(dequantised(folder, kind, torch.float32), targets)
    assert loss == pytest.approx(expected, rel=1e-5)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-7)
    assert abs(loss - fitted(opened(folder), targets)[0]) > 1e-4, "quantising must have changed something"


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_in_bf16(tiny: Path, kind: str) -> None:
    loss, grads = fitted(opened(tiny, kind, torch.bfloat16))
    expected, expected_grads = fitted(dequantised(tiny, kind, torch.bfloat16))
    assert loss == pytest.approx(expected, rel=1e-2)
    flat, other = (torch.cat([g.reshape(-1) for g in all_]) for all_ in (grads, expected_grads))
    assert torch.cosine_similarity(flat, other, dim=0) > 0.999


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("update", [None, Lora(4, 8), Lora(4, 8, dora=True), Lora(4, 8, dropout=0.3)])
def test_a_layer_alone_equals_a_plain_one_that_holds_the_same_numbers(kind: str, update: Lora | None) -> None:
    few = QuantisedLinear(quant.quantised(drawn(96, 64), kind), torch.nn.Parameter(drawn(96), requires_grad=False))
    plain = torch.nn.Linear(64, 96).requires_grad_(False)
    plain.weight.copy_(few.weight.full(torch.float32))
    plain.bias.copy_(few.bias)
    layers = [few, plain]
    if update:
        layers = [LoraLinear(layer, update, torch.Generator().manual_seed(1)) for layer in layers]
        for layer in layers:
            layer.lora_B.data.fill_(0.1)
            layer.seed = 7 if update.dropout else None
    found = []
    for layer in layers:
        x = drawn(2, 5, 64).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)))
    assert len(found[0]) == (2 if update is None else 5 if update.dora else 4) and found[0][0].shape == (2, 5, 96)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_are_quantised_and_nothing_else(tiny: Path, kind: str) -> None:
    model = opened(tiny, kind)
    assert sum(isinstance(m, QuantisedLinear) for m in model.modules()) == 14
    assert {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} == {"lm_head"}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    lora.attach(model, rank=4, alpha=8, targets=["q_proj"], seed=0)
    layers = model.get_decoder().layers
    assert isinstance(layers[0].self_attn.q_proj, LoraLinear)
    assert isinstance(layers[0].self_attn.k_proj, QuantisedLinear)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_validated_first_trains_the_same(tiny: Path, kind: str) -> None:
    model = opened(tiny, kind)
    loop.mean_loss(model, rows(), 3, 512)
    assert fitted(model)[0] == fitted(opened(tiny, kind))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_switched_off_adapter_is_the_quantised_base(tiny: Path, kind: str) -> None:
    batch = batches.layout(rows(), 3)
    model = opened(tiny, kind)
    with torch.no_grad():
        before = loop.logprobs(model, batch)
        lora.attach(model, rank=4, alpha=8, targets="all-linear", seed=0)
        assert torch.equal(loop.logprobs(model, batch), before)
        for parameter in lora.parameters(model):
            parameter.fill_(0.1)
        assert not torch.allclose(loop.logprobs(model, batch), before)
        with lora.disabled(model):
            assert torch.equal(loop.logprobs(model, batch), before)


def test_a_quantised_module_is_not_trained_whole(tiny: Path) -> None:
    for names in (["q_proj"], ["layers.0"], ["embed_tokens", "mlp"]):
        with pytest.raises(ConfigError, match="quantised") as caught:
            whole.attach(opened(tiny, "nf4"), names)
        assert "train.quantize" in caught.value.fix
    model = opened(tiny, "nf4")
    whole.attach(model, ["embed_tokens", "lm_head"])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_recomputed_layers_give_the_same_gradients_bit_for_bit(tiny: Path, quantize: str) -> None:
    model = opened(tiny, quantize)
    recompute.layers(model)
    loss, grads = fitted(model)
    expected, expected_grads = fitted(opened(tiny, quantize))
    assert loss == expected and all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("full", [False, True])
def test_a_step_with_recomputed_layers_is_the_same_step(tiny: Path, full: bool) -> None:
    """Adapters that drop inputs, whose masks must come again, and every weight trained."""
    schedule = loop.Schedule(2, 4, 1e-2, 0.0, 0.0, 1.0, 0, 64)
    after = []
    for again in (False, True):
        model = opened(tiny)
        if full:
            free = whole.everything(model)
        else:
            lora.attach(model, rank=4, alpha=8, targets="all-linear", seed=0, dropout=0.3)
            free = lora.parameters(model)
        if again:
            recompute.layers(model)
        flat = loop.Flat(free)
        losses = [result.loss for result in loop.steps(model, flat, rows(), 3, schedule)]
        after.append((losses, flat.value_N))
    assert after[0][0] == after[1][0] and torch.equal(after[0][1], after[1][1])


def test_recomputed_layers_keep_their_input_alone(tmp_path: Path) -> None:
    folder = write_model(tmp_path, num_hidden_layers=6)

    def kept(model: torch.nn.Module) -> int:
        """Bytes of distinct tensors that the forward pass keeps for the backward pass."""
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        lora.attach(model, rank=4, alpha=8, targets="all-linear", seed=3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loop.logprobs(model, batches.layout(rows(), 3))
        return sum(found.values())

    model = opened(folder)
    recompute.layers(model)
    assert kept(model) < 0.3 * kept(opened(folder))
