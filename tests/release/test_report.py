"""The page: complete, self-contained, escaped, deterministic, and whole where pieces are missing."""

from __future__ import annotations

import html.parser
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from metier import config, cost, plots, records, runs
from metier.errors import ResourceError
from metier.records import Completion, Example, Message, Score
from metier.release import gate, report

EVIL = (
    '<script>alert(1)</script><img src="http://evil.test/x"> @import url(http://evil.test) {{ 7*7 }} \'"--> '
    "\u202egpj.exe \x1b[31m"
)
LICENCES = ("apache-2.0", "bsd-new", "gpl-2.0-plus", "lgpl-2.1", "mit", "mpl-2.0")
CATEGORIES = {"apache-2.0": "permissive", "bsd-new": "permissive", "mit": "permissive", "mpl-2.0": "weak copyleft"}
SKILL = {"base": 0.1, "prompt": 0.4, "few-shot": 0.55, "tuned": 0.85}
NOTICES = (
    "Licensed under the {0} license; you may not use this file except in compliance with it.\n\nUnless required by "
    "applicable law or agreed to in writing, software distributed under the licence is provided “as is”.",
    "The terms of use of the software are governed by {0}. See the file COPYING for the details.",
    "This plugin is free software: you can redistribute it and/or modify it under the terms of {0}, or (at your "
    "option) any later version. It comes WITHOUT ANY WARRANTY; without even the implied warranty of merchantability.",
)


def make_run(
    run: Path,
    *,
    cases: int = 60,
    arms: tuple[str, ...] = config.ARMS,
    skill: dict[str, float] = SKILL,
    hostile: str = "",
    fields: tuple[str, str] = ("license", "category"),
    **sealed: Any,
) -> Path:
    """A small finished run, its figures drawn at random with a fixed seed, and every text `hostile` where it may be."""
    random_ = random.Random(0)
    spec = _spec(arms)
    for folder in ("data", "train", "proof"):
        (run / folder).mkdir(parents=True)
    runs.write(run / "specialist.yaml", config.dump(spec))
    examples = [_example(i, random_, hostile, fields) for i in range(cases)]
    _write_data(run / "data", examples, hostile)
    _write_training(run / "train", hostile)
    outputs, scores = [], []
    for arm in arms:
        for example in examples:
            completion, judged = _answer(example, arm, skill[arm], random_, hostile)
            outputs.append(completion)
            scores += judged
    proof = run / "proof"
    runs.write(proof / "outputs.jsonl", records.lines(outputs))
    runs.write(proof / "scores.jsonl", records.lines(scores))
    seal = runs.sha256(run / "data" / "test.jsonl")
    found = gate.verdict(
        scores,
        outputs,
        {e.id: e.group for e in examples},
        spec.prove,
        sealed={"registered": "ab" * 32, "seal": seal, "registered_before_training": True} | sealed,
        costs={arm: _cost([o for o in outputs if o.arm == arm]) for arm in arms},
    )
    runs.write_json(proof / "verdict.json", found)
    return run


def _spec(arms: tuple[str, ...]) -> config.Spec:
    rivals = [arm for arm in ("prompt", "few-shot") if arm in arms] or (["base"] if "base" in arms else [])
    claims = [{"beats": arm} for arm in rivals] + [{"format": "valid"}]
    return config.validate(
        {
            "name": "licence-clerk",
            "task": {"instruction": "Read the notice and answer with one JSON object.", "schema": "answer.schema.json"},
            "data": {"examples": ["pairs.jsonl"], "attribution": "Notices from the ScanCode data set, CC BY 4.0."},
            "prove": {"arms": list(arms), "claims": claims},
        },
        "a test",
    )


def _example(number: int, random_: random.Random, hostile: str, fields: tuple[str, str]) -> Example:
    licence = random_.choice(LICENCES)
    expected = {fields[0]: licence, fields[1]: CATEGORIES.get(licence, "copyleft")}
    notice = random_.choice(NOTICES).format(licence) + hostile
    messages = (Message("system", "Read it."), Message("user", notice), Message("assistant", json.dumps(expected)))
    return Example(f"case-{number:03}{hostile}", messages, {"row": number}, f"group-{number}", expected, ("json",))


def _write_data(folder: Path, examples: list[Example], hostile: str) -> None:
    runs.write(folder / "test.jsonl", records.lines(examples))
    runs.write(folder / "card.md", f"# Data card\n\nNotices and their licences. {hostile}\n")
    test = runs.sha256(folder / "test.jsonl")
    split = {"rows": 700, "groups": 650, "tokens": 84_000, "supervised_tokens": 15_400}
    dataset = {
        "counts": {"in": 947, "used": 900, "duplicate": 40, "rejected": 7},
        "splits": {"train": split, "valid": split | {"rows": 140}, "test": split | {"rows": len(examples)}},
        "hashes": {"test.jsonl": test},
        "seal": test,
        "opened": 1,
        "reasons": {"the same as another row": 40, f"empty answer{hostile}": 7},
        "findings": [{"what": f"train has 700 rows of the 1,000 asked for{hostile}", "fix": "give more data"}],
    }
    runs.write_json(folder / "dataset.json", dataset)


def _write_training(folder: Path, hostile: str) -> None:
    random_ = random.Random(1)
    metrics: list[dict[str, Any]] = []
    for step in range(1, 89):
        loss = 0.06 + 2.6 * 0.93**step + 0.25 * random_.random() * 0.97**step
        metrics.append(
            {"step": step, "stage": "sft", "loss": loss, "lr": 1e-3, "grad_norm": 0.8, "tokens": 1900}
            | {"supervised_tokens": 350, "seconds": 1.9}
        )
        if step % 22 == 0:
            metrics.append({"step": step, "stage": "sft", "valid_loss": 0.09 + 2.4 * 0.93**step})
    runs.write(folder / "metrics.jsonl", records.lines(metrics))
    plan = {
        "device": "cpu",
        "dtype": "bf16",
        "micro_batch_tokens": 4096,
        "checkpointing": "none",
        "memory_gb": {"predicted": 2.31, "measured": 2.187},
        "tokens_per_second": {"predicted": 1010.0, "measured": 942.5},
        "seconds": {"predicted": 740.0, "measured": None},
        "why": [f"bf16: the faster number format in this machine's own measurement {hostile}".strip()],
    }
    runs.write_json(folder / "plan.json", plan)
    act = {"format": 1, "act": "train", "inputs": {"base": "cd" * 32}, "seconds": 812.4}
    runs.write_json(folder / "act.json", act | {"outputs": {"adapter/adapter_model.safetensors": "ef" * 32}})


def _answer(
    example: Example, arm: str, skill: float, random_: random.Random, hostile: str
) -> tuple[Completion, list[Score]]:
    """A completion that is right as often as `skill`, and what the graders say of it."""
    answer = dict(example.expected)
    kind = random_.random()
    first, second = answer
    if kind > skill:
        answer[first] = random_.choice([x for x in LICENCES if x != answer[first]]) + hostile
        if random_.random() < 0.4:
            answer[second] = "public domain" + hostile
    valid = kind < skill or random_.random() < skill
    parses = valid or random_.random() < 0.6
    answer |= {} if valid else {"note": "I think so" + hostile}
    text = json.dumps(answer) if parses else f"Sure! The licence is {answer[first]}, because{hostile}"
    values: dict[str, float | None] = {"json": float(parses), "schema": float(valid)}
    values |= {f"field:{k}": float(parses and answer[k] == v) for k, v in example.expected.items()}
    values["all"] = float(valid and parses and answer == example.expected)
    why = {"json": f"Expecting value: line 1 column 1 {hostile}", "schema": f"`note` is not allowed {hostile}"}
    scores = [Score(example.id, arm, g, v, "" if v else why.get(g, "differs")) for g, v in values.items()]
    tokens = {"base": 110, "prompt": 240, "few-shot": 610, "tuned": 110}[arm] + random_.randrange(40)
    finish = "stop" if parses else "length"
    return Completion(example.id, arm, text, tokens, len(text) // 4, finish, 0.11), scores


def _cost(outputs: list[Completion]) -> dict[str, float]:
    prompt, new = sum(o.prompt_tokens for o in outputs), sum(o.new_tokens for o in outputs)
    return cost.arm_cost(prompt, 60, new, len(outputs), cost.Rates(1000, 100), 0.10)


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; refuses tags that are not closed in order."""

    VOID = ("meta", "br", "img", "link", "input", "use", "path", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def hold_self_contained(text: str) -> Page:
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "embed", "base", "form", "foreignobject"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        assert name not in ("src", "srcset", "data", "action", "poster", "background"), name
        if name in ("href", "xlink:href"):
            assert value.startswith("#"), value
        if name in ("style", "fill", "clip-path", "filter"):
            assert all(u.startswith("#") for u in re.findall(r"url\(([^)]*)", value)), value
    for mark in ('src="http', "src='http", '<link rel="stylesheet" href="http', "@import"):
        assert mark not in text
    assert "default-src 'none'" in text
    return page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "clerk")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return report.report(run, run / "proof")


def test_the_page_tells_the_whole_story(run: Path, page: str) -> None:
    text = hold_self_contained(page).text
    verdict = json.loads((run / "proof" / "verdict.json").read_text())
    assert {"ship": "Ship it.", "do-not-ship": "Do not ship.", "cannot-tell": "Cannot tell yet."}[
        verdict["verdict"]
    ] in text
    for arm, figures in verdict["arms"].items():
        assert arm in text
        assert f"{figures['all'] * 100:.1f}\u00a0%" in text
    for claim in verdict["claims"]:
        assert f"{claim['low'] * 100:.1f}".replace("-", "−") in text
        assert claim["test"] in text
    for said in (
        *(
            "13 min 32 s",
            "2.31 GB",
            "2.19 GB",
            "−5\u00a0%",
            "947 rows came in",
            "empty answer",
            "Where only tuned is right",
        ),
        *(verdict["sealed"]["seal"], verdict["sealed"]["registered"], "metier prove specialist.yaml", "seed 0"),
        *("Notices from the ScanCode data set, CC BY 4.0.", "train has 700 rows", "the faster number format"),
    ):
        assert said in text, said


def test_two_renderings_are_the_same_bytes(run: Path, page: str) -> None:
    assert report.report(run, run / "proof") == page
    assert str(run) not in page


def test_cases_stand_in_the_order_of_the_test_set(page: str) -> None:
    wrong = page[page.index("Where tuned is wrong") : page.index("Where only tuned is right")]
    shown = re.findall(r"input <code>(case-\d+)</code>", wrong)
    assert shown == sorted(shown)
    assert 1 < len(shown) <= report.WRONG_CASES


def test_four_hundred_cases_stay_small(tmp_path: Path) -> None:
    big = make_run(tmp_path / "big", cases=400)
    assert len(report.report(big, big / "proof").encode()) < 600_000


def test_hostile_texts_are_shown_and_do_nothing(tmp_path: Path) -> None:
    hostile = make_run(tmp_path / "evil", hostile=EVIL, fields=("li<b>$x_1$</b>", "许可证 & \u202eevil"))
    text = report.report(hostile, hostile / "proof")
    found = hold_self_contained(text)
    assert "<script>alert(1)</script>" in found.text
    assert "{{ 7*7 }}" in found.text
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert "li<b>$x_1$</b>" in found.text


@pytest.mark.parametrize("arms", [("tuned",), ("base", "tuned"), ("few-shot", "tuned")])
def test_absent_arms(tmp_path: Path, arms: tuple[str, ...]) -> None:
    small = make_run(tmp_path / "few", cases=20, arms=arms)
    found = hold_self_contained(report.report(small, small / "proof"))
    assert ("There is no other system" in found.text) == (arms == ("tuned",))


def test_a_flawless_specialist(tmp_path: Path) -> None:
    flawless = make_run(tmp_path / "best", cases=20, skill=SKILL | {"tuned": 2.0})
    assert "Nowhere: every answer" in hold_self_contained(report.report(flawless, flawless / "proof")).text


def test_without_training_figures_and_card(tmp_path: Path) -> None:
    bare = make_run(tmp_path / "bare", cases=20)
    for name in ("train/metrics.jsonl", "train/plan.json", "train/act.json", "data/card.md"):
        (bare / name).unlink()
    assert "No training curve was recorded." in hold_self_contained(report.report(bare, bare / "proof")).text


def test_the_proof_may_be_elsewhere(tmp_path: Path, page: str) -> None:
    moved = make_run(tmp_path / "clerk")
    (moved / "proof").rename(moved / ".work-prove")
    assert report.report(moved, moved / ".work-prove") == page


def test_missing_scores_and_late_claims_are_limits(tmp_path: Path) -> None:
    late = make_run(tmp_path / "late", cases=20, registered_before_training=False)
    path = late / "proof" / "scores.jsonl"
    lines = path.read_text().splitlines()
    lines[-1] = lines[-1].replace('"value": 0.0', '"value": null').replace('"value": 1.0', '"value": null')
    runs.write(path, "\n".join(lines) + "\n")
    text = hold_self_contained(report.report(late, late / "proof")).text
    assert "Of tuned’s answers, 1 could not be judged by “all right”" in text
    assert "The claims were registered after training." in text


def test_answers_that_are_texts(tmp_path: Path) -> None:
    plain = make_run(tmp_path / "plain", cases=20)
    path = plain / "data" / "test.jsonl"
    rows = [json.loads(line) | {"expected": "a text"} for line in path.read_text().splitlines()]
    runs.write(path, records.lines(rows))
    assert "a text" in hold_self_contained(report.report(plain, plain / "proof")).text


# figures


def test_loss_plot_with_and_without_validation(run: Path) -> None:
    metrics = [row for _, row in records.objects(run / "train" / "metrics.jsonl")]
    whole = plots.loss_plot(metrics)
    assert whole.startswith("<svg")
    assert "validation" in whole
    assert "training, smoothed" in whole
    assert "validation" not in plots.loss_plot([m for m in metrics if "loss" in m])
    assert "training, smoothed" not in plots.loss_plot([m for m in metrics if "valid_loss" in m])
    assert plots.loss_plot([]) == plots.loss_plot([{"step": 1, "loss": float("nan")}]) == ""
    assert plots.loss_plot(metrics) == whole
    assert plots.loss_plot(metrics[:1]).startswith("<svg")


def test_a_second_stage_goes_on_where_the_first_ended() -> None:
    lines = [{"step": s, "stage": stage, "loss": 1.0} for stage in ("one", "two") for s in (1, 2, 3)]
    training, _ = plots._curves(lines)
    assert [step for step, _ in training] == [1, 2, 3, 4, 5, 6]


def test_smoothing_keeps_ends_and_lines() -> None:
    line = [float(i) for i in range(100)]
    assert plots._smooth(line) == pytest.approx(line)


def test_figures_take_their_colours_from_the_page() -> None:
    svg = plots.whisker(5, 1, 9, span=(-2, 12), threshold=0, asked=2, colour="pass", title='"<&')
    assert "var(--pass, #1c7a4d)" in svg
    assert not re.search(r"#0000[01][0-9a-f]\b", svg)
    assert 'aria-label="&quot;&lt;&amp;"' in svg
    Page(svg)


def test_without_matplotlib_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ResourceError, match="metier\\[report\\]"):
        plots.loss_plot([{"step": 1, "loss": 1.0}])
