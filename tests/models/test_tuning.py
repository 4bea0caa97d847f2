"""What is trained: LoRA's variants, modules trained whole, and every weight; PEFT and plain autograd as the oracles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import write_base, write_model
from metier.errors import ConfigError, ResourceError, RunError
from metier.models import attention, head, linear, load, lora, tensors, tuned, whole
from metier.models.attention import Rows
from metier.models.linear import Lora, LoraLinear

CPU = torch.device("cpu")
ROW = [3, 4, 250, 100, 101, 9, 9, 106]
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dora-rslora": {"dora": True, "rslora": True},
    "dropout": {"dropout": 0.25},
}
BESIDE = {
    "both-tied": (True, ("embed_tokens", "lm_head")),
    "embedding": (False, ("embed_tokens",)),
    "head": (False, ("lm_head",)),
    "norms": (True, ("norm",)),
    "one-layer": (True, ("layers.1.mlp",)),
}


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load.model(load.resolve(str(folder), folder), dtype=dtype, device=CPU)


def theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits(model: Any) -> torch.Tensor:
    states = attention.hidden_states(model, torch.tensor(ROW), Rows([len(ROW)], prefix=0, device=CPU))
    return head.logits(model, states)


def loss(model: Any) -> torch.Tensor:
    states = attention.hidden_states(model, torch.tensor(ROW), Rows([len(ROW)], prefix=0, device=CPU))
    weight = model.get_output_embeddings().weight
    return -head.logprobs(states[:-1], weight, torch.tensor(ROW[1:]), softcap=head.softcap(model)).sum()


def their_loss(model: Any) -> torch.Tensor:
    logprobs = model(torch.tensor([ROW])).logits[0, :-1].log_softmax(-1)
    return -logprobs.gather(1, torch.tensor(ROW[1:])[:, None]).sum()


def attach(model: Any, targets: Any = "all-linear", beside: tuple[str, ...] = (), **kind: Any) -> None:
    lora.attach(model, rank=4, alpha=8, targets=targets, seed=3, **kind)
    whole.attach(model, beside)


def stir(model: Any) -> None:
    """Moves every trained number a little, the same way each time."""
    for number, parameter in enumerate(lora.parameters(model)):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose head is a tensor of its own."""
    return write_model(tmp_path_factory.mktemp("loose"), tie_word_embeddings=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", [k for k in VARIANTS if "dora" not in k])
def test_a_fresh_variant_is_the_base_bit_for_bit(tiny: Path, kind: str, dtype: torch.dtype) -> None:
    model = ours(tiny, dtype)
    with torch.no_grad():
        before = logits(model)
        attach(model, beside=("norm", "embed_tokens", "lm_head"), **VARIANTS[kind])
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_fresh_dora_layer_is_the_frozen_one_bit_for_bit(tiny: Path, dtype: torch.dtype) -> None:
    model = ours(tiny, dtype)
    with torch.no_grad():
        before = logits(model)
        attach(model, dora=True)
        x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
        for layer in lora.adapted(model).values():
            if layer.weight.shape[1] == 48:
                assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
        # The layers around it go another way than those of the base, which rounds otherwise.
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(logits(model), before, rtol=tolerance, atol=tolerance)
        with lora.disabled(model):
            assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_layer_equals_its_formula_written_out(kind: str) -> None:
    """W' = W + s·BA, rescaled to the magnitudes where it is DoRA; autograd gives the gradients."""
    generator = torch.Generator().manual_seed(0)
    base = torch.nn.Linear(6, 5)
    with torch.no_grad():
        base.weight.copy_(torch.randn(5, 6, generator=generator))
    base.requires_grad_(False)
    layer = LoraLinear(base, Lora(rank=3, alpha=2, **VARIANTS[kind]), generator)
    scale = 2 / 3**0.5 if layer.lora.rslora else 2 / 3
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(5, 3, generator=generator))
        if layer.magnitude is not None:
            layer.magnitude += 0.3
    x = torch.randn(2, 4, 6, generator=generator).requires_grad_()
    slope = torch.randn(2, 4, 5, generator=generator)
    trained = [p for p in layer.parameters() if p.requires_grad]
    layer.seed = 11 if layer.lora.dropout else None
    got = layer(x)
    got_grads = torch.autograd.grad((got * slope).sum(), [x, *trained])

    update = scale * layer.lora_B @ layer.lora_A
    if layer.magnitude is not None:
        moved = base.weight + update
        expected = x @ (layer.magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True).detach()).t() + base.bias
    else:
        kept = 1 - layer.lora.dropout
        mask = linear._mask(x.reshape(-1, 6), 1 - kept, 11).view_as(x) / kept if layer.lora.dropout else 1.0
        expected = x @ base.weight.t() + base.bias + (x * mask) @ update.t()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    expected_grads = torch.autograd.grad((expected * slope).sum(), [x, *trained])
    for one, other in zip(got_grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_mask_keeps_its_share() -> None:
    mask = linear._mask(torch.empty(400, 500), 0.25, 7)
    assert mask.unique().tolist() == [0, 1]
    assert (mask == 0).float().mean() == pytest.approx(0.25, abs=0.005)
    assert torch.equal(mask, linear._mask(torch.empty(400, 500), 0.25, 7))
    assert not torch.equal(mask, linear._mask(torch.empty(400, 500), 0.25, 8))


def test_masks_depend_on_the_key_and_the_layer_and_end_with_the_block(tiny: Path) -> None:
    model = ours(tiny)
    attach(model, dropout=0.3)
    stir(model)

    def seeds(*key: int) -> list[int | None]:
        with lora.dropping(model, *key):
            return [layer.seed for layer in lora.adapted(model).values()]

    assert seeds(1, 2, 3) == seeds(1, 2, 3) and len(set(seeds(1, 2, 3))) == len(lora.adapted(model))
    assert not {*seeds(1, 2, 3)} & {*seeds(1, 2, 4)} and not {*seeds(1, 2, 3)} & {*seeds(1, 23)}
    with torch.no_grad():
        plain = logits(model)
        with lora.dropping(model, 1):
            dropped = logits(model)
        assert torch.equal(logits(model), plain) and not torch.allclose(dropped, plain)


@pytest.mark.parametrize("kind", [k for k in VARIANTS if k != "dropout"])
def test_gradients_equal_pefts(tiny: Path, tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    model = ours(tiny)
    attach(model, beside=("norm",), **VARIANTS[kind])
    stir(model)
    lora.save(model, tmp_path / "adapter", base=str(tiny))
    oracle = peft.PeftModel.from_pretrained(theirs(tiny), tmp_path / "adapter", is_trainable=True).eval()
    ours_loss, oracle_loss = loss(model), their_loss(oracle)
    assert ours_loss.item() == pytest.approx(oracle_loss.item(), rel=1e-5)
    ours_loss.backward()
    oracle_loss.backward()
    expected = {
        n.replace(".default.weight", "" if "magnitude" in n else ".weight")
        .replace(".default", "")
        .replace(".modules_to_save", ""): p.grad
        for n, p in oracle.named_parameters()
        if p.requires_grad
    }
    got = dict(zip(lora.state(model), [p.grad for p in lora.parameters(model)], strict=True))
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], rtol=2e-3, atol=5e-5, msg=name)


@pytest.mark.parametrize("kind", VARIANTS)
def test_saved_variants_have_the_same_logits_here_and_in_peft(tiny: Path, tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    model = ours(tiny)
    attach(model, targets=["q_proj", "down_proj"], **VARIANTS[kind])
    stir(model)
    lora.save(model, tmp_path, base=str(tiny))
    oracle = peft.PeftModel.from_pretrained(theirs(tiny), tmp_path).eval()
    again = ours(tiny)
    lora.load(again, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(oracle(torch.tensor([ROW])).logits[0], logits(model), rtol=0, atol=1e-4)
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", BESIDE)
def test_modules_trained_whole_are_saved_loaded_and_switched_off(
    tiny: Path, loose: Path, tmp_path: Path, kind: str
) -> None:
    peft = pytest.importorskip("peft")
    tied, names = BESIDE[kind]
    folder = tiny if tied else loose
    model = ours(folder)
    with torch.no_grad():
        base = logits(model)
    attach(model, targets=["q_proj"], beside=names)
    stir(model)
    lora.save(model, tmp_path, base=str(folder))
    oracle = peft.PeftModel.from_pretrained(theirs(folder), tmp_path).eval()
    again = ours(folder)
    lora.load(again, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(oracle(torch.tensor([ROW])).logits[0], logits(model), rtol=0, atol=1e-4)
        for one in (model, again):
            assert torch.equal(logits(one), logits(model)) and not torch.allclose(logits(one), base)
            with lora.disabled(one):
                assert torch.equal(logits(one), base)
    assert len(lora.parameters(again)) == len(lora.parameters(model)), "tied weights stay tied"


@pytest.mark.parametrize("kind", ["dora-rslora-whole", "untied", "head-alone"])
def test_adapters_made_by_peft_are_read(tiny: Path, tmp_path: Path, kind: str) -> None:
    """PEFT trains tied weights as two; such an adapter has other values for the two."""
    peft = pytest.importorskip("peft")
    beside = {"dora-rslora-whole": ["norm"], "untied": ["embed_tokens", "lm_head"], "head-alone": ["lm_head"]}[kind]
    variant = {"use_dora": True, "use_rslora": True} if kind.startswith("dora") else {}
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], modules_to_save=beside, lora_dropout=0.1, **variant
    )
    oracle = peft.get_peft_model(theirs(tiny), settings).eval()
    for number, parameter in enumerate(p for p in oracle.parameters() if p.requires_grad):
        with torch.no_grad():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    oracle.save_pretrained(tmp_path)
    model = ours(tiny)
    lora.load(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), oracle(torch.tensor([ROW])).logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "beside", "says", "fix"),
    [
        ("all-linear", ("embed_token",), "no module is called embed_token", "did you mean embed_tokens"),
        ("all-linear", ("embed_tokens",), "ties model.embed_tokens.weight and lm_head.weight", "embed_tokens, lm_head"),
        ("all-linear", ("mlp",), "gate_proj would get an adapter and be trained whole", "not in both"),
        (["lm_head"], (), "no linear layer is called lm_head", "modules_to_save"),
        (["q_prj"], (), "no linear layer is called q_prj", "did you mean q_proj"),
    ],
)
def test_modules_that_cannot_be_trained_are_refused(
    tiny: Path, targets: Any, beside: tuple[str, ...], says: str, fix: str
) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        attach(ours(tiny), targets=targets, beside=beside)
    assert fix in caught.value.fix


def test_full_tuning_that_does_not_fit_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(tiny)
    monkeypatch.setattr(load, "available_memory", lambda device: 16 * model.num_parameters() - 1)
    with pytest.raises(ResourceError, match="besides the weights") as caught:
        whole.everything(model)
    assert "tune: lora" in caught.value.fix


@pytest.mark.parametrize("kind", [*load.ARCHITECTURES, "untied", "biases"])
def test_full_gradients_equal_plain_autograd(tmp_path: Path, kind: str) -> None:
    folder = write_base(tmp_path, kind)
    model, oracle = ours(folder), theirs(folder)
    for one in (model, oracle):
        with torch.no_grad():
            for number, parameter in enumerate(one.parameters()):
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    whole.everything(model)
    loss(model).backward()
    their_loss(oracle.requires_grad_(True)).backward()
    expected = {n: p.grad for n, p in oracle.named_parameters()}
    got = {n: p.grad for n, p in model.named_parameters()}
    assert got.keys() == expected.keys()
    assert model.get_input_embeddings().weight.grad.is_sparse == (kind == "untied"), "only the rows of the batch"
    for name, grad in got.items():
        torch.testing.assert_close(grad.to_dense(), expected[name], rtol=2e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_trained_head_by_autograd_and_in_chunks(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(9, 6, generator=generator).requires_grad_()
    weight = torch.randn(11, 6, generator=generator).requires_grad_()
    targets = torch.tensor([0, 1, 2, 3, 4, 5, 6, 3, 3])
    slope = torch.randn(9, generator=generator)
    scores = states @ weight.t()
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    expected = scores.log_softmax(-1)[torch.arange(9), targets]
    expected_grads = torch.autograd.grad((expected * slope).sum(), [states, weight])
    monkeypatch.setattr(head, "WIDE", 4)
    got = head.logprobs(states, weight, targets, softcap=softcap)
    torch.testing.assert_close(got, expected)
    for one, other in zip(torch.autograd.grad((got * slope).sum(), [states, weight]), expected_grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_whole_model_is_saved_in_the_same_bytes_and_loads_anywhere(
    loose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shards: int
) -> None:
    base = load.resolve(str(loose), loose)
    model = ours(loose, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    size = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(whole, "SHARD_BYTES", size if shards == 1 else size // 2)
    for name in ("one", "two"):
        whole.save(model, tmp_path / name / "model", base=base.folder)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert sum(f.suffix == ".safetensors" for f in files) == shards
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    made = tuned.folder(tmp_path / "one")
    assert tuned.weights(tmp_path / "one") == [f.as_posix() for f in files if f.suffix == ".safetensors"]
    again = tuned.load(base, made, dtype=dtype, device=CPU)
    oracle = AutoModelForCausalLM.from_pretrained(made)
    assert oracle.dtype == dtype
    for other in (again, oracle):
        for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two), name


def test_a_tied_weight_is_written_once(tiny: Path, tmp_path: Path) -> None:
    whole.save(ours(tiny), tmp_path, base=tiny)
    assert tensors.read(tmp_path / whole.WEIGHTS).keys() == tensors.read(tiny / "model.safetensors").keys()
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


def test_of_two_whole_models_one_is_in_memory(tiny: Path, tmp_path: Path) -> None:
    base = load.resolve(str(tiny), tiny)
    trained = ours(tiny)
    with torch.no_grad():
        trained.get_decoder().norm.weight.mul_(2)
    whole.save(trained, tmp_path / "model", base=tiny)
    pair = tuned.Pair(base, tmp_path, dtype=torch.float32, device=CPU)
    loaded = []
    real = load.model

    def model(*args: Any, **kwargs: Any) -> Any:
        assert pair._model is None, "the other one is let go first"
        loaded.append(args[0].folder)
        return real(*args, **kwargs)

    tuned.bases.model = model  # type: ignore[assignment]
    try:
        for wanted in (False, False, True):
            with torch.no_grad(), pair.model(tuned=wanted) as held:
                assert torch.equal(logits(held), logits(trained)) == wanted
    finally:
        tuned.bases.model = real
    assert loaded == [tiny, tmp_path / "model"]


def test_what_is_not_trained_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(RunError, match="not trained yet"):
        tuned.folder(tmp_path)
