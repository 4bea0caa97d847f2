"""Settings: declared once, refused with the nearest name, and every one read by something."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from metier import config
from metier.errors import ConfigError

GOOD = "name: a\ntask: {instruction: hi}\ndata: {examples: [a.jsonl]}\n"


def load(text: str, tmp_path: Path, *overrides: str) -> config.Spec:
    (tmp_path / "specialist.yaml").write_text(text, encoding="utf-8")
    return config.load(tmp_path, overrides).spec


def test_defaults_are_written_out_and_read_back(tmp_path: Path) -> None:
    spec = load(GOOD, tmp_path)
    assert spec.train[0].rank == 16 and spec.base == "smollm2-135m"
    assert config.validate(config.parse(config.dump(spec), "x"), "x") == spec


def test_yaml_12_scalars(tmp_path: Path) -> None:
    spec = load(GOOD.replace("hi", "no") + "train: [{learning_rate: 1e-4}]\nseed: 12\n", tmp_path)
    assert spec.train[0].learning_rate == 1e-4 and spec.task.instruction == "no" and spec.seed == 12


def test_byte_order_mark_and_crlf_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "specialist.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert config.load(tmp_path).spec.name == "a"


BAD = {
    "": "empty",
    "# only a comment\n": "empty",
    "- a\n": "not a mapping",
    "a\n": "not a mapping",
    GOOD + "name: b\n": "stands twice, in lines 1 and 4",
    GOOD + "x: &a 1\ny: *a\n": "anchors and aliases",
    GOOD + "x: !!python/object:os.system y\n": "tag .* is refused",
    GOOD + "seed: 0123\n": "two numbers",
    GOOD + "sede: 1\n": "sede is not a setting",
    GOOD + "train: [{learning_rte: 1}]\n": "learning_rte is not a setting",
    GOOD + "train: [{learning_rate: .nan}]\n": "learning_rate",
    GOOD + "train: [{learning_rate: .inf}]\n": "learning_rate",
    GOOD + "train: [{learning_rate: -1}]\n": "learning_rate",
    GOOD + "train: [{learning_rate: 0}]\n": "learning_rate",
    GOOD + "train: [{epochs: 1e9}]\n": "epochs",
    GOOD + "train: [{batch_size: 1000000000000}]\n": "batch_size",
    GOOD + "train: [{rank: yes}]\n": "rank",
    GOOD + "train: [{rank: true}]\n": "number, not yes or no",
    GOOD + "train: [{drop: 0.1}]\n": "drop is not a setting",
    GOOD + "train: [{rank: 0}]\n": "rank",
    GOOD + "train: [{alpha: 0}]\n": "alpha",
    GOOD + "train: [{dropout: 1}]\n": "dropout",
    GOOD + "train: [{dora: true, dropout: 0.1}]\n": "dora and dropout do not go together",
    GOOD + "train: [{targets: []}]\n": "targets names no module",
    GOOD + "train: [{tune: full, rank: 8}]\n": "rank means nothing with tune: full",
    GOOD + "train: [{tune: full, dora: true}]\n": "dora means nothing with tune: full",
    GOOD + "train: [{tune: full, quantize: nf4}]\n": "quantize means nothing with tune: full",
    GOOD + "train: [{tune: full}]\nship: {formats: [adapter]}\n": "adapter is not what tune: full makes; it is model",
    GOOD + "ship: {formats: [model]}\n": "model is not what tune: lora makes; it is adapter",
    GOOD + "train: [{method: grpo}]\n": "method",
    GOOD + "train: [{method: distill}]\n": "needs a teacher",
    GOOD + "train: [{teacher: b}]\n": "teacher means nothing in the method sft",
    GOOD + "train: [{method: self-distill, beta: 0.5}]\n": "beta means nothing in the method self-distill",
    GOOD + "train: [{method: distill, teacher: b, draw_every: 2}]\n": "draw_every means nothing",
    GOOD + "train: [{method: distill, teacher: b, dft: true}]\n": "dft means nothing",
    GOOD + "train: [{method: distill, teacher: b, beta: 1.5}]\n": "beta",
    GOOD + "train: [{method: distill, teacher: b, temperature: 0}]\n": "temperature",
    GOOD + "train: [{method: distill, teacher: b, top_k: 0}]\n": "top_k",
    GOOD + "train: [{method: self-distill, ratio_clip: 0.5}]\n": "ratio_clip",
    GOOD + "train: [{method: self-distill, tune: full}]\n": "needs tune: lora",
    GOOD + "train: []\n": "train",
    GOOD + "seed: -1\n": "seed",
    GOOD + "seed: 1.5\n": "seed",
    GOOD + "seed: null\n": "seed",
    GOOD + "seed: 99999999999999999999999\n": "seed",
    GOOD + "prove: {claims: [{}]}\n": "exactly one of",
    GOOD + "prove: {claims: [{beats: prompt, format: valid}]}\n": "exactly one of",
    GOOD + "prove: {claims: [{keeps: general}]}\n": "keeps is not a setting",
    GOOD + "prove: {arms: [tuned]}\n": "add them to prove.arms",
    GOOD + "machine: {device: tpu}\n": "device",
    GOOD.replace("name: a", "name: ../../etc"): "name",
    GOOD.replace("name: a", "name: 'a; rm -rf ~'"): "name",
    GOOD.replace("name: a", "name: A"): "name",
    GOOD.replace("name: a\n", ""): "name is missing",
    GOOD.replace("examples: [a.jsonl]", ""): "no source",
    GOOD.replace("examples", "documents"): "need a reader",
    "name: a\n  b: c\n": "not YAML",
    "name: [\n": "not YAML",
    "{a: b}: c\n": "not a plain text",
    "[" * 10_000: "not YAML|nested deeper",
}


@pytest.mark.parametrize(("text", "says"), list(BAD.items()), ids=[v[:30] + str(i) for i, v in enumerate(BAD.values())])
def test_bad_settings_are_one_clear_error(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load(text, tmp_path)
    assert caught.value.fix and "specialist.yaml" in caught.value.where


def test_the_nearest_name_is_offered(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(GOOD + "train: [{learning_rte: 1}]\n", tmp_path)
    assert caught.value.fix == "did you mean learning_rate?"


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p.write_bytes(GOOD.encode("utf-16")),
        lambda p: p.write_bytes(b"name: caf\xe9\n"),
        lambda p: p.write_bytes(b"#" * (config.MAX_BYTES + 1)),
        lambda p: p.mkdir(),
        lambda p: None,
        lambda p: __import__("os").mkfifo(p),
    ],
    ids=["utf-16", "latin-1", "too-large", "folder", "missing", "fifo"],
)
def test_files_that_are_no_settings(tmp_path: Path, make: object) -> None:
    file = tmp_path / "s.yaml"
    make(file)  # type: ignore[operator]
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    assert caught.value.fix and str(tmp_path) in caught.value.where


def test_overrides(tmp_path: Path) -> None:
    spec = load(GOOD, tmp_path, "train.rank=8", "train.0.learning_rate=2e-4", "data.sizes.test=7", "name=b")
    assert (spec.train[0].rank, spec.train[0].learning_rate, spec.data.sizes.test, spec.name) == (8, 2e-4, 7, "b")
    with pytest.raises(ConfigError, match="not key=value"):
        load(GOOD, tmp_path, "rank")
    with pytest.raises(ConfigError, match="rnk is not a setting"):
        load(GOOD, tmp_path, "train.rnk=8")
    with pytest.raises(ConfigError, match="no place"):
        load(GOOD, tmp_path, "name.x.y=8")


@given(st.text(max_size=60))
def test_no_text_gives_another_kind_of_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        config.validate(config.parse(text, "x"), "x")


def settings_classes(owner: type[BaseModel]) -> set[type[BaseModel]]:
    found = {owner}
    for field in owner.model_fields.values():
        inner = config._settings_in(field.annotation)
        if inner is not None:
            found |= settings_classes(inner)
    return found


def test_every_setting_is_read_somewhere() -> None:
    """A setting nobody reads is a lie; attributes are looked for in all code but the declarations themselves."""
    source = Path(config.__file__).parent
    read: set[str] = set()
    for file in source.rglob("*.py"):
        tree = ast.parse(file.read_text())
        attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
        if file.name == "config.py":
            attributes = [n for n in attributes if isinstance(n.value, ast.Name) and n.value.id == "self"]
        read |= {n.attr for n in attributes}
    containers = {"task", "data", "sizes", "package", "prove", "claims", "ship", "machine", "train"}
    names = {n for c in settings_classes(config.Spec) for n in c.model_fields} - containers
    assert sorted(names - read) == []


TWO = GOOD.replace("[a.jsonl]", "[a.jsonl], text: [b.md]")


def test_a_later_stage_has_the_adapter_of_the_first(tmp_path: Path) -> None:
    spec = load(TWO + "train: [{method: cpt, rank: 8, targets: [q_proj]}, {epochs: 1}]\n", tmp_path)
    assert [(s.method, s.rank, s.targets) for s in spec.train] == [("cpt", 8, ("q_proj",)), ("sft", 8, ("q_proj",))]
    assert config.validate(config.parse(config.dump(spec), "x"), "x") == spec
    spec = load(TWO + "train: [{method: cpt}, {epochs: 1}]\n", tmp_path, "train.1.epochs=3", "train.0.replay=0.1")
    assert spec.train[1].epochs == 3 and spec.train[0].replay == 0.1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TWO + "train: [{method: cpt, rank: 8}, {rank: 4}]\n", "train.1.rank is 4, train.0.rank is 8"),
        (TWO + "train: [{method: cpt, quantize: nf4}, {quantize: int8}]\n", "train.1.quantize is int8"),
        (TWO, "data.text is learnt by the method cpt"),
        (GOOD + "train: [{method: cpt}]\n", "needs data.text"),
        (GOOD + "train: [{replay: 0.1}]\n", "replay means nothing in the method sft"),
        (TWO.replace("[a.jsonl], ", "[], ") + "train: [{method: cpt}, {}]\n", "train.1 .sft. needs data.examples"),
        (TWO.replace("text:", "replay: [c.md], text:") + "train: [{method: cpt}]\n", "give it `replay`"),
        (GOOD.replace("[a.jsonl]", "[a.jsonl, b.jsonl], mix: {a.jsonl: 1}"), "'b.jsonl' has no weight"),
        (GOOD.replace("[a.jsonl]", "[a.jsonl], mix: {a.jsonl: 1, c: 2}"), "'c' in data.mix is no entry"),
        (GOOD.replace("[a.jsonl]", "[a.jsonl], mix: {a.jsonl: 0}"), "data.mix.a.jsonl"),
    ],
)
def test_stages_and_sources_that_contradict_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(text, tmp_path)


def test_the_limit_of_a_row() -> None:
    answers, raw = config.Stage(), config.Stage(method="cpt")  # type: ignore[call-arg]
    assert [answers.limit(c) for c in (None, 512)] == [None, 512]
    assert [raw.limit(c) for c in (None, 512, 8192)] == [1024, 512, 1024]
    assert config.Stage(max_length=64).limit(512) == 64  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="over the base's context of 512"):
        config.Stage(method="cpt", max_length=600).limit(512)  # type: ignore[call-arg]
