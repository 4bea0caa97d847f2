"""Distillation on tiny models: the equalities of the loop, a teacher of the same tokens, and rounds of own answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import metier
from conftest import write_model, write_specialist
from metier import config
from metier.config import Stage
from metier.errors import DataError, ModelError
from metier.models import load, lora
from metier.objectives import logps
from metier.records import Example, Message
from metier.text import batches
from metier.text.batches import Row
from metier.text.chat import Renderer
from metier.training import loop, rollouts, teacher

CPU = torch.device("cpu")
SCHEDULE = loop.Schedule(
    steps=3, batch_size=8, learning_rate=1e-2, warmup=0.3, weight_decay=0.1, clip=1.0, seed=5, tokens=10_000
)
DISTILL = Stage(method="distill", teacher="teacher", top_k=8, beta=0.3, temperature=1.5)  # type: ignore[call-arg]
SELF = Stage(method="self-distill", top_k=8, draw_every=2)  # type: ignore[call-arg]


def model_of(folder: Path):
    return load.model(load.resolve(str(folder), folder), dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("teacher"), hidden_size=60, intermediate_size=96)


def rows(count: int = 8, seed: int = 1) -> list[Row]:
    random = np.random.default_rng(seed)
    made = []
    for n in range(count):
        ids = np.concatenate([[3, 4, 5], random.integers(6, 384, random.integers(8, 30))])
        made.append(Row(f"r{n}", ids, np.arange(ids.size) >= ids.size - 3 - n % 4))
    return made


def taught(folder: Path, data: Sequence[Row], stage: Stage = DISTILL) -> list[Row]:
    model = model_of(folder)
    return logps.scored(data, lambda batch: logps.teacher_columns(*teacher.likeliest(model, batch, stage)))


def student(tiny: Path):
    model = model_of(tiny)
    lora.attach(model, rank=4, alpha=8, targets="all-linear", seed=0)
    return model, loop.Flat(lora.parameters(model))


def trained(tiny: Path, data: Sequence[Row], schedule: loop.Schedule, prefix: int, stage: Stage) -> torch.Tensor:
    model, flat = student(tiny)
    list(loop.steps(model, flat, data, prefix, schedule, stage=stage))
    return flat.value_N.clone()


@pytest.fixture(scope="module")
def columns(tiny: Path, larger: Path) -> list[Row]:
    """Rows with every column that any method looks for."""
    data = taught(larger, rows())
    model, _ = student(tiny)

    def drawn(batch):
        return {logps.DRAWN_LOGPS: loop.logprobs(model, batch).detach().numpy() - 0.1}

    def reference(batch):
        return {logps.REFERENCE_LOGPS: loop.logprobs(model, batch).detach().numpy() - 0.2}

    return logps.with_places(logps.scored(logps.scored(data, drawn), reference))


@pytest.mark.parametrize(
    "stage",
    [DISTILL, SELF, Stage(dft=True), Stage(method="constrained-sft")],  # type: ignore[call-arg]
    ids=["distill", "self-distill", "dft", "constrained-sft"],
)
def test_one_by_eight_equals_eight_by_one_equals_two_by_four(tiny: Path, columns: list[Row], stage: Stage) -> None:
    whole = trained(tiny, columns, SCHEDULE, 0, stage)
    start = trained(tiny, columns, replace(SCHEDULE, steps=0), 0, stage)
    assert (whole - start).abs().max() > 1e-2
    for tokens, prefix in ((1, 0), (60, 0), (10_000, 3)):  # one row at a time; a few; behind a shared prefix
        pieces = trained(tiny, columns, replace(SCHEDULE, tokens=tokens), prefix, stage)
        torch.testing.assert_close(pieces, whole, rtol=0, atol=3e-4)


def test_a_student_that_is_its_teacher_learns_nothing(tiny: Path) -> None:
    data = taught(tiny, rows())
    model, flat = student(tiny)
    result = next(loop.steps(model, flat, data, 3, SCHEDULE, stage=DISTILL))
    assert abs(result.loss) < 1e-5 and result.grad_norm < 1e-4


def test_the_loss_by_hand(tiny: Path, larger: Path) -> None:
    """Every row alone through the untouched models, the whole vocabulary written out, the bucket summed."""
    data = taught(larger, rows(4))
    expected, weight = 0.0, 0
    for row in data:
        at = np.flatnonzero(row.supervised) - 1
        ids = torch.from_numpy(row.ids)[None]
        both = [model_of(f)(ids, layout=_alone(row)).logits[0, at].div(1.5).log_softmax(-1) for f in (tiny, larger)]
        chosen = torch.from_numpy(row.columns[logps.TEACHER_IDS]).long()
        s, t = (
            torch.cat([p.gather(1, chosen), (1 - p.exp().gather(1, chosen).sum(1, keepdim=True)).log()], 1)
            for p in both
        )
        mixture = (0.3 * t.exp() + 0.7 * s.exp()).log()
        kl = 0.3 * (t.exp() * (t - mixture)).sum() + 0.7 * (s.exp() * (s - mixture)).sum()
        expected, weight = expected + kl.item(), weight + len(at)
    assert loop.mean_loss(model_of(tiny), data, 3, 50, DISTILL) == pytest.approx(expected / weight, rel=1e-4)


def _alone(row: Row):
    from metier.models.attention import Rows

    layout = Rows([row.ids.size], prefix=0, device=CPU)
    layout.spare = 0
    return layout


def test_distilling_lowers_the_divergence_on_held_out_rows(tiny: Path, larger: Path) -> None:
    stage = Stage(method="distill", teacher="teacher", top_k=16)  # type: ignore[call-arg]
    data, held_out = taught(larger, rows(256), stage), taught(larger, rows(16, seed=2), stage)
    model, flat = student(tiny)
    before = loop.mean_loss(model, held_out, 3, 4096, stage)
    schedule = replace(SCHEDULE, steps=60, batch_size=16, learning_rate=0.03, weight_decay=0.0)
    list(loop.steps(model, flat, data, 3, schedule, stage=stage))
    assert loop.mean_loss(model, held_out, 3, 4096, stage) < 0.85 * before


def test_a_teacher_is_loaded_only_where_it_is_asked(
    tiny: Path, larger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_specialist(tmp_path / "s", tiny, train=[{"method": "distill", "teacher": str(larger), "top_k": 5}])
    loaded = config.load(folder)
    base = load.resolve(str(tiny), tmp_path)

    def ask() -> list[Row]:
        stage = loaded.spec.train[0]
        return teacher.taught([rows(3)], loaded, stage, base, tmp_path / "logps", dtype=torch.float32, device=CPU)[0]

    first = ask()
    monkeypatch.setattr(load, "model", lambda *_, **__: pytest.fail("loaded again"))
    for one, other in zip(ask(), first, strict=True):
        assert np.array_equal(one.columns[logps.TEACHER_LOGPS], other.columns[logps.TEACHER_LOGPS])


def test_the_reference_is_the_base_whatever_the_adapter_holds(tiny: Path, tmp_path: Path) -> None:
    """By hand: every row alone through the untouched model. With a fresh adapter each token costs (2/β) ln 2."""
    model, flat = student(tiny)
    stage = Stage(method="constrained-sft")  # type: ignore[call-arg]
    data = teacher.referenced([rows(4)], model, load.resolve(str(tiny), tiny), tmp_path)[0]
    beta = np.concatenate([[0.5, *[2.0] * 4, *[0.1] * 9][: int(r.supervised.sum())] for r in data])
    assert loop.mean_loss(model, data, 3, 60, stage) == pytest.approx(float((2 / beta * np.log(2)).mean()), rel=1e-4)
    flat.value_N += 0.05
    untouched = model_of(tiny)
    for row in teacher.referenced([rows(4)], model, load.resolve(str(tiny), tiny), tmp_path / "anew")[0]:
        with torch.no_grad():
            alone = loop.logprobs(untouched, batches.layout([row], 0)).numpy()
        np.testing.assert_allclose(row.columns[logps.REFERENCE_LOGPS], alone, rtol=1e-4, atol=1e-5)


def test_a_teacher_with_another_tokenizer_is_refused(tiny: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other")
    tree = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(tree, indent=1))
    folder = write_specialist(tmp_path / "s", tiny, train=[{"method": "distill", "teacher": str(other)}])
    metier.build(folder, runs=tmp_path / "runs")
    with pytest.raises(ModelError, match="another tokenizer") as caught:
        metier.train(folder, runs=tmp_path / "runs")
    assert caught.value.where == "train.teacher"


@pytest.mark.parametrize("method", ["distill", "self-distill"])
def test_rows_over_the_teachers_context_are_refused_before_the_first_step(
    tiny: Path, tmp_path: Path, method: str
) -> None:
    """The rows fit the student; the teacher's context, or its prompt with the answer before it, does not hold them."""
    context = {"distill": 60, "self-distill": 100}[method]  # rows have about 76 tokens, behind their answer 119
    short = write_model(tmp_path / "short", max_position_embeddings=context)
    base, own = (tiny, {"teacher": str(short)}) if method == "distill" else (short, {})
    folder = write_specialist(tmp_path / "s", base, train=[{"method": method, **own}])
    metier.build(folder, runs=tmp_path / "runs")
    with pytest.raises(DataError, match="context of"):
        metier.train(folder, runs=tmp_path / "runs")
    assert not (tmp_path / "runs/colours/.work-train/metrics.jsonl").exists()


def test_a_larger_vocabulary_of_the_teacher_is_cut_to_the_students(tiny: Path, tmp_path: Path) -> None:
    padded = model_of(write_model(tmp_path / "padded", vocab_size=400))
    batch = batches.layout(rows(2), 0)
    ids, logprobs = teacher.likeliest(padded, batch, replace_top_k(1000), 384)
    assert ids.shape[1] == 384 and ids.max() < 384
    np.testing.assert_allclose(np.exp(logprobs).sum(1), 1, rtol=1e-5)


def replace_top_k(count: int) -> Stage:
    return DISTILL.model_copy(update={"top_k": count})


# Rounds of own answers


EXAMPLES = [
    Example(f"e{n}", (Message("user", f"which colour is thing {n}?"), Message("assistant", f"red {n}")), {}, f"g{n}")
    for n in range(6)
]


def source(model, renderer: Renderer, kept: Path, stage: Stage = SELF) -> rollouts.Rollouts:
    end = int(renderer.render(EXAMPLES[0].messages).ids[renderer.render(EXAMPLES[0].messages).supervised][-1])
    return rollouts.Rollouts(model=model, stage=stage, seed=3, longest=7, end=end, kept=kept / rollouts.FOLDER)


def test_the_teacher_sees_the_answer_and_the_student_does_not(renderer: Renderer) -> None:
    (shown,) = rollouts.demonstrations(EXAMPLES[:1], renderer)
    assert "red 0" not in renderer.parse(shown.plain_T) and "red 0" in renderer.parse(shown.shown_T)
    assert shown.plain_T.tolist() == renderer.prompt(EXAMPLES[0].prompt).tolist()


def test_drawn_answers_hold_what_each_model_says_of_them(tiny: Path, renderer: Renderer, tmp_path: Path) -> None:
    """The student's and the teacher's numbers, found row by row; the adapter is on for one and off for the other."""
    model, flat = student(tiny)
    flat.value_N += 0.02
    demonstrations = rollouts.demonstrations(EXAMPLES, renderer)
    drawn = source(model, renderer, tmp_path).draw(demonstrations, "x")
    for row, d in zip(drawn, demonstrations, strict=True):
        answer = row.ids[d.plain_T.size :]
        assert row.ids[: d.plain_T.size].tolist() == d.plain_T.tolist() and 1 <= answer.size <= 7
        assert row.supervised.sum() == answer.size and row.columns[logps.TEACHER_IDS][:, 0].tolist() == answer.tolist()
        seen = Row(
            "seen", np.concatenate([d.shown_T, answer]), np.arange(d.shown_T.size + answer.size) >= d.shown_T.size
        )
        with torch.no_grad():
            own = loop.logprobs(model, batches.layout([row], 0)).numpy()
            with lora.disabled(model):
                theirs = loop.logprobs(model, batches.layout([seen], 0)).numpy()
        np.testing.assert_allclose(row.columns[logps.DRAWN_LOGPS], own, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(row.columns[logps.TEACHER_LOGPS][:, 0], theirs, rtol=1e-3, atol=1e-4)


def test_draws_are_a_function_of_seed_and_step(tiny: Path, renderer: Renderer, tmp_path: Path) -> None:
    model, _ = student(tiny)
    demonstrations = rollouts.demonstrations(EXAMPLES, renderer)

    def ids(name: str) -> list[list[int]]:
        return [r.ids.tolist() for r in source(model, renderer, tmp_path).draw(demonstrations, name)]

    assert ids("round:0") == ids("round:0") != ids("round:2")
    rounds = [source(model, renderer, tmp_path)._round(step, step, demonstrations) for step in (0, 2)]
    assert [r.ids.tolist() for r in rounds[0]] != [r.ids.tolist() for r in rounds[1]], "the same weights, other draws"


def test_rounds_go_on_bit_for_bit_from_their_midst(tiny: Path, renderer: Renderer, tmp_path: Path) -> None:
    schedule = replace(SCHEDULE, steps=6, batch_size=2, learning_rate=3e-2)
    demonstrations = rollouts.demonstrations(EXAMPLES, renderer)
    data = [Row.of(e.id, renderer.render(e.messages)) for e in EXAMPLES]
    model, flat = student(tiny)
    held = {}
    for result in source(model, renderer, tmp_path).steps(demonstrations, flat, data, 0, schedule):
        held[result.step] = {name: tensor.clone() for name, tensor in flat.tensors().items()}
    for cut in (2, 3):  # at the edge of a round, and within one
        model, flat = student(tiny)
        flat.restore(held[cut])
        list(source(model, renderer, tmp_path).steps(demonstrations, flat, data, 0, schedule, start=cut))
        assert torch.equal(flat.value_N, held[6]["value"])
    kept = sorted(p.name for p in (tmp_path / rollouts.FOLDER).iterdir())
    assert kept == [f"round-{s:08d}.safetensors" for s in (0, 2, 4)]
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / rollouts.FOLDER / kept[2]).unlink()
    model, flat = student(tiny)
    list(source(model, renderer, tmp_path).steps(demonstrations, flat, data, 0, schedule, start=4))
    assert sorted(p.name for p in (tmp_path / rollouts.FOLDER).iterdir()) == kept[1:], "of no use to any checkpoint"


# Whole runs


@pytest.mark.parametrize("method", ["constrained-sft", "distill", "self-distill"])
def test_a_whole_run_interrupted_and_resumed(
    tiny: Path, larger: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {
        "constrained-sft": {},
        "distill": {"teacher": str(larger), "top_k": 8},
        "self-distill": {"draw_every": 2, "top_k": 8},
    }
    stage = {"method": method, "rank": 4, "alpha": 8, "learning_rate": 0.01, "epochs": 1, "batch_size": 5}
    stage |= {"checkpoint_every": 3, "validations": 2, **own[method]}
    spec = write_specialist(tmp_path / "colours", tiny, train=[stage])

    def trained(name: str) -> bytes:
        metier.train(spec, runs=tmp_path / name)
        return (tmp_path / name / "colours" / "train" / "adapter" / "adapter_model.safetensors").read_bytes()

    for name in ("whole", "cut"):
        metier.build(spec, runs=tmp_path / name)
    expected = trained("whole")
    lines = [json.loads(line) for line in (tmp_path / "whole/colours/train/metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [method] * 8 and sum("valid_loss" in line for line in lines) == 2

    steps = loop.steps

    def interrupted(*words, **more):
        for result in steps(*words, **more):
            if result.step == 5:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(loop, "steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        metier.train(spec, runs=tmp_path / "cut")
    monkeypatch.setattr(loop, "steps", steps)
    assert trained("cut") == expected
