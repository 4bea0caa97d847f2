"""Documents and rows become the data set folder: `build` runs the stages from top to bottom.

Read, answer check, exact duplicates, groups, split, rendering, leak check, write. Each input row is one line of the
ledger, and `in = used + duplicate + rejected` holds by assertion. The bytes written depend on the inputs, the settings
and the seed alone.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from metier import config, progress, records, runs
from metier.data import check, dedupe, importers, ingest, texts
from metier.data.ingest import Found, Rejected
from metier.data.split import NAMES, split
from metier.errors import DataError
from metier.records import Document, Example, Message

TEMPLATE = "chat_template.jinja"
FILES = (
    *(f"{name}.jsonl" for name in (*NAMES, *texts.NAMES, "ledger")),
    *("task.json", TEMPLATE, "card.md", "dataset.json"),
)


class Rendered(Protocol):
    """Token ids (T,) of a conversation and which of them are supervised (T,)."""

    @property
    def ids(self) -> Any: ...
    @property
    def supervised(self) -> Any: ...


class Renderer(Protocol):
    def render(self, messages: tuple[Message, ...], /) -> Rendered: ...
    def document(self, text: str, /) -> Any: ...


@dataclass(frozen=True)
class Task:
    """The task as later acts read it, with its files resolved."""

    instruction: str
    schema: dict[str, Any] | None
    prompt: str | None
    shots: int


@dataclass
class Rows:
    """Every input row in input order: an example while it is in, and what became of it once it is out."""

    examples: dict[int, Example] = field(default_factory=dict)
    where: list[str] = field(default_factory=list)
    out: dict[int, tuple[str, str]] = field(default_factory=dict)
    together: dict[int, str] = field(default_factory=dict)
    cut: dict[int, str] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)

    def add(self, where: str, row: Example | Rejected, together: str = "") -> None:
        index = len(self.where)
        self.where.append(where)
        if isinstance(row, Rejected):
            self.out[index] = ("rejected", row.reason)
        else:
            self.examples[index] = row
            self.together[index] = together

    def leave_out(self, index: int, fate: str, reason: str) -> None:
        del self.examples[index]
        self.out[index] = (fate, reason)

    def rejected(self) -> list[Rejected]:
        return [Rejected(self.where[i], reason) for i, (fate, reason) in sorted(self.out.items()) if fate == "rejected"]

    def ledger(self) -> list[dict[str, str]]:
        return [self._line(i, where) for i, where in enumerate(self.where)]

    def _line(self, index: int, where: str) -> dict[str, str]:
        if index in self.examples:
            own = {"id": self.examples[index].id}
            if index in self.cut:
                return {"where": where, "fate": "truncated", "reason": self.cut[index], **own}
            return {"where": where, "fate": "used", **own}
        fate, reason = self.out[index]
        return {"where": where, "fate": fate, "reason": reason}


def build(
    loaded: config.Loaded, work: Path, renderer: Renderer, context: int | None = None, template: str | None = None
) -> dict[str, Any]:
    """Writes the data set into the folder `work` and returns its counts, splits and findings.

    `renderer` is what training will use: it counts tokens, and a row in which it finds nothing to learn is refused.
    `context` is the most tokens that the base takes, `template` the chat template that the task gives it.
    """
    before = inputs(loaded)
    _clear(work)
    task = _task(loaded)
    rows, splits, figures = _ask(loaded, task, renderer, context) if loaded.spec.data.asks else (Rows(), {}, {})
    raw = texts.texts(loaded, renderer)
    if inputs(loaded) != before:
        raise DataError(
            "an input changed while it was read", where=str(loaded.folder), fix="run the same command again"
        )
    dataset = _dataset(loaded.spec, rows, splits, figures, raw)
    _write(work, loaded.spec, task, template, {**splits, **raw.splits}, [*rows.ledger(), *raw.ledger], dataset)
    return {name: dataset[name] for name in ("counts", "splits", "findings", "seal")}


def _ask(
    loaded: config.Loaded, task: Task, renderer: Renderer, context: int | None
) -> tuple[Rows, dict[str, list[Example]], dict[str, Any]]:
    """The questions with their answers: every input row, the splits, and what dataset.json says of them alone."""
    spec, rows = loaded.spec, Rows()
    limit = _limit(spec, context)
    documents = _read_documents(loaded, task, rows)
    _read_examples(loaded, task, rows)
    if spec.data.truncate and limit:
        _cut(rows, renderer, limit)
    _leave_out(rows, dedupe.exact(list(rows.examples.values())))
    _hold_share(rows, spec.data.max_rejected)
    groups = _group(rows, spec.data.near_duplicate)
    splits, lengths = _sample(rows, spec, renderer, limit)
    check.leaks(splits)
    figures = {name: _figures(splits[name], lengths) for name in NAMES}
    mix = {"mix": _mixed(spec.data.mix, splits["train"])} if spec.data.mix else {}
    return rows, splits, {"splits": figures, "groups": groups, **documents, **mix}


def _limit(spec: config.Spec, context: int | None) -> int | None:
    """Most tokens of a row that every stage which learns from the answers can take."""
    limits = [limit for stage in spec.train if stage.method != "cpt" and (limit := stage.limit(context))]
    return min(limits, default=context)


def _cut(rows: Rows, renderer: Renderer, limit: int) -> None:
    """Cuts the last question of every row that is over the limit at its end, to the most that fits."""
    for index, example in rows.examples.items():
        tokens = _tokens(example, renderer)
        question = example.messages[-2].content
        if tokens > limit and _tokens(_asking(example, question, 1), renderer) <= limit:
            kept = _fitting(example, renderer, limit)
            rows.examples[index] = _asking(example, question, kept)
            rows.cut[index] = (
                f"truncated: {tokens:,} tokens, so {len(question) - kept:,} characters of the question went"
            )


def _fitting(example: Example, renderer: Renderer, limit: int) -> int:
    """How many characters of the last question fit."""
    question = example.messages[-2].content

    def tokens(characters: int) -> int:
        return _tokens(_asking(example, question, characters), renderer)

    kept = bisect.bisect(range(1, len(question)), limit, key=tokens)
    while tokens(kept) > limit:  # a character more can make a token less, so the search may end past the place
        kept -= 1
    return kept


def _asking(example: Example, question: str, characters: int) -> Example:
    """The example with the first characters of a question as its last."""
    *before, _, answer = example.messages
    return dataclasses.replace(example, messages=(*before, Message("user", question[:characters]), answer))


def _tokens(example: Example, renderer: Renderer) -> int:
    """Tokens of a row; 0 where it cannot be rendered, which is found again where rows are measured."""
    return _measured(example, renderer, None)[0][0]


def inputs(loaded: config.Loaded) -> dict[str, str]:
    """name -> sha256 of everything the data set is made from. A package is named by its pinned hash, and not opened."""
    data, task = loaded.spec.data, loaded.spec.task
    patterns = (*data.documents, *data.text, *data.replay)
    out = {name: runs.sha256(path) for name, path in ingest.paths(loaded, patterns)}
    if data.package:
        out[f"{data.package.name}=={data.package.version}"] = data.package.sha256
    for name, path in ingest.paths(loaded, data.examples):
        if path.stat().st_size == 0:
            raise DataError("the file is empty", where=str(path), fix="write one JSON object a line")
        out[name] = runs.sha256(path)
    template = None if task.template in config.TEMPLATES else task.template
    for what, named in (
        ("reader", data.reader),
        ("schema", task.schema_file),
        ("prompt", task.prompt),
        ("template", template),
    ):
        if named:
            out[named] = runs.sha256(ingest.beside(loaded, named, what))
    return out


def _clear(work: Path) -> None:
    """Removes what an earlier, interrupted build left."""
    for path in work.iterdir():
        if path.name in FILES or path.name.endswith(".tmp"):
            path.unlink()


def _task(loaded: config.Loaded) -> Task:
    task = loaded.spec.task
    schema = prompt = None
    if task.schema_file:
        path = ingest.beside(loaded, task.schema_file, "schema")
        schema = check.schema(ingest.text(path, "schema"), str(path))
    if task.prompt:
        prompt = ingest.text(ingest.beside(loaded, task.prompt, "prompt"), "prompt")
    return Task(task.instruction, schema, prompt, task.shots)


def _read_documents(loaded: config.Loaded, task: Task, rows: Rows) -> dict[str, int]:
    """Adds what the reader finds in the documents; returns how many documents there were and how many gave no row."""
    if not loaded.spec.data.reader:
        return {}
    refused: list[Rejected] = []
    known: set[str] = set()

    def fit() -> Any:
        for document in ingest.documents(loaded):
            if isinstance(document, Document):
                known.add(document.where)
                yield document
            else:
                refused.append(document)

    reader = ingest.beside(loaded, loaded.spec.data.reader, "reader")
    readings = ingest.readings(reader, fit())
    sources = [ingest.document_of(r.where, known) for r in readings]
    answers = check.Answers(task.schema)
    mix = {"mix": "documents"} if loaded.spec.data.mix else {}
    for row in refused:
        rows.add(row.where, row)
    for reading, document in zip(readings, sources, strict=True):
        if isinstance(reading, Rejected):
            rows.add(reading.where, reading)
        else:
            together = f"group {reading.group}" if reading.group else f"document {document}"
            rows.add(reading.where, _found(reading, task, answers, mix), together)
    without = len(known - set(sources))
    progress.note(f"read {len(known) + len(refused):,} documents: {len(rows.examples):,} examples")
    return {"documents": len(known) + len(refused), "documents_without_rows": without}


def _read_examples(loaded: config.Loaded, task: Task, rows: Rows) -> None:
    answers = check.Answers(task.schema)
    data = loaded.spec.data
    entries = {name: entry for entry in reversed(data.examples) for name, _ in ingest.paths(loaded, [entry])}
    for name, path in ingest.paths(loaded, data.examples):
        mix = {"mix": entries[name]} if data.mix else {}
        for row in importers.examples(path, name):
            if isinstance(row, Rejected):
                rows.add(row.where, row)
            else:
                rows.unused.update(row.unused)
                rows.add(row.where, _imported(row, name, task, answers, mix), f"group {row.group}" if row.group else "")


def _found(found: Found, task: Task, answers: check.Answers, mix: dict[str, str]) -> Example | Rejected:
    if not found.input.strip():
        return Rejected(found.where, "empty_input: a question without text")
    try:
        value = found.answer if isinstance(found.answer, str) else answers.ordered(found.answer)
        text = value if isinstance(value, str) else _compact(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"the reader gave an answer that is not JSON: {error}",
            where=found.where,
            fix="give texts, finite numbers, lists and dicts with text keys",
        ) from error
    messages = (Message("system", task.instruction), Message("user", found.input), Message("assistant", text))
    expected = text if isinstance(value, str) else json.loads(text)
    return _example(found.where, messages, {"document": found.where, **mix}, expected, answers)


def _imported(
    row: importers.Row, name: str, task: Task, answers: check.Answers, mix: dict[str, str]
) -> Example | Rejected:
    system = () if row.messages[0].role == "system" else (Message("system", task.instruction),)
    source = {"document": name, "row": int(row.where.rpartition(":")[2]), **mix}
    return _example(row.where, (*system, *row.messages), source, row.messages[-1].content, answers)


def _example(
    where: str, messages: tuple[Message, ...], source: dict[str, Any], expected: Any, answers: check.Answers
) -> Example | Rejected:
    """The row as an example, or why it is none. A text that is a JSON object counts as that object."""
    text = messages[-1].content
    if not text.strip():
        return Rejected(where, "empty_target: an answer without text")
    if isinstance(expected, str) and (answers.schema is not None or text.lstrip().startswith("{")):
        value = _parsed(text, where)
        if isinstance(value, Rejected) and answers.schema is not None:
            return value
        expected = text if isinstance(value, Rejected) else value
    if wrong := answers.wrong(expected):
        return Rejected(where, f"answer fails the schema: {wrong}")
    content = "\0".join((where, *(f"{m.role}\0{m.content}" for m in messages)))
    name = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return _readable(where, Example(name, messages, source, name, expected))


def _parsed(text: str, where: str) -> Any:
    """The answer's JSON value, or its rejection."""
    try:
        return records.loads(text.encode("utf-8", "surrogatepass"), where)
    except DataError as error:
        return Rejected(where, f"answer fails the schema: not JSON ({importers.refusal(error)})")


def _readable(where: str, example: Example) -> Example | Rejected:
    """The example, unless the line it would be could not be read back."""
    try:
        records.loads(records.lines([example]), where)
    except DataError as error:
        return Rejected(where, importers.refusal(error))
    except UnicodeEncodeError:
        return Rejected(where, "lone_surrogate: a text holds a lone surrogate")
    return example


def _compact(value: Any) -> str:
    _hold_keys(value)
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _hold_keys(value: Any) -> None:
    """Refuses keys that JSON would silently turn into texts."""
    if isinstance(value, dict):
        if not all(isinstance(k, str) for k in value):
            raise TypeError("a key is not a text")
        for inner in value.values():
            _hold_keys(inner)
    elif isinstance(value, list):
        for inner in value:
            _hold_keys(inner)


def _leave_out(rows: Rows, fates: Mapping[int, tuple[str, str]]) -> None:
    """Takes rows out by their place among those still in."""
    indices = list(rows.examples)
    for place, (fate, reason) in fates.items():
        rows.leave_out(indices[place], fate, reason)


def _sample(
    rows: Rows, spec: config.Spec, renderer: Renderer, limit: int | None
) -> tuple[dict[str, list[Example]], dict[str, tuple[int, int]]]:
    """The splits, and (tokens, supervised tokens) of their rows by id.

    A row in which nothing can be learnt, or which is too long, is left out when it is chosen, and the split made again
    without it: the same splits as if all rows had been rendered first, at the cost of the chosen ones.
    """
    lengths: dict[str, tuple[int, int]] = {}
    while True:
        splits, left = _split(rows, spec)
        unfit = {}
        for place, example in enumerate(rows.examples.values()):
            if example.id not in left and example.id not in lengths:
                lengths[example.id], reason = _measured(example, renderer, limit)
                if reason:
                    unfit[place] = ("rejected", reason)
        _leave_out(rows, unfit)
        if not unfit:
            break
    _hold_share(rows, spec.data.max_rejected)
    _leave_out(rows, {n: ("rejected", left[e.id]) for n, e in enumerate(rows.examples.values()) if e.id in left})
    return splits, lengths


def _split(rows: Rows, spec: config.Spec) -> tuple[dict[str, list[Example]], dict[str, str]]:
    try:
        return split(list(rows.examples.values()), spec.data.sizes, spec.seed, spec.data.balance)
    except DataError as error:
        rejected = rows.rejected()
        lost = f"; {len(rejected):,} rows were rejected: {importers.summary(rejected)}" if rejected else ""
        raise DataError(error.what + lost, where=error.where, fix=error.fix) from error


def _measured(example: Example, renderer: Renderer, limit: int | None) -> tuple[tuple[int, int], str]:
    """(tokens, supervised tokens) of a row, and why it cannot be trained on; empty where it can."""
    try:
        rendered = renderer.render(example.messages)
    except DataError as error:
        return (0, 0), error.what
    found = len(rendered.ids), int(rendered.supervised.sum())
    return found, _unfit(*found, limit)


def _unfit(tokens: int, supervised: int, limit: int | None) -> str:
    """Why a row of so many tokens cannot be trained on; empty where it can."""
    if not supervised:
        return f"empty_target: none of its {tokens:,} tokens is supervised"
    if limit and tokens > limit:
        return f"too_long: {tokens:,} tokens, over the limit of {limit:,}"
    return ""


def _hold_share(rows: Rows, most: float) -> None:
    """Refuses a build in which more rows were rejected than the settings accept, or all."""
    if not rows.where:
        raise DataError("no row was found", where="data", fix="check that the reader yields Found for its documents")
    importers.hold_share(rows.rejected(), len(rows.where), most, left=bool(rows.examples))


def _group(rows: Rows, threshold: float) -> dict[str, Any]:
    """Gives each row its group: near duplicates of its question, and what the sources say belongs together."""
    examples = rows.examples
    shared = Counter(rows.together[i] for i in examples)
    together = [name if shared[name := rows.together[i]] > 1 else "" for i in examples]
    groups = dedupe.groups([_question(e) for e in examples.values()], threshold, together)
    names: dict[int, str] = {}
    for index, group in zip(list(examples), groups, strict=True):
        name = names.setdefault(group, examples[index].id)
        examples[index] = dataclasses.replace(examples[index], group=name)
    sizes = sorted(Counter(groups).values(), reverse=True)
    return {"rows": len(groups), "groups": len(sizes), "alone": sizes.count(1), "largest": sizes[:8]}


def _question(example: Example) -> str:
    return "\n".join(m.content for m in example.prompt if m.role != "system")


def _mixed(weights: Mapping[str, float], train: Sequence[Example]) -> dict[str, dict[str, float]]:
    """For each source its weight, its rows in train, and the share of an epoch that is drawn from it."""
    rows = Counter(e.source["mix"] for e in train)
    if without := sorted(weights.keys() - rows.keys()):
        raise DataError(
            f"{without[0]} has a weight and no row in train",
            where="data.mix",
            fix="see its lines in the ledger, raise data.sizes.train, or take it out",
        )
    whole = sum(weights.values())
    return {name: {"weight": w, "rows": rows[name], "share": round(w / whole, 6)} for name, w in weights.items()}


def _dataset(
    spec: config.Spec,
    rows: Rows,
    splits: Mapping[str, Sequence[Example]],
    figures: Mapping[str, Any],
    raw: texts.Texts,
) -> dict[str, Any]:
    """dataset.json, but for what is known only once the other files are written."""
    out = [*rows.out.values(), *((line["fate"], line["reason"]) for line in raw.ledger if line["fate"] != "used")]
    reasons = Counter(importers.code(reason) for _, reason in out)
    fates = Counter(fate for fate, _ in out)
    raw_figures = {name: texts.figures(documents, raw.tokens) for name, documents in raw.splits.items()}
    counts = {"in": len(rows.where) + len(raw.ledger)}
    counts["used"] = len(rows.examples) + sum(len(documents) for documents in raw.splits.values())
    counts |= {fate: fates[fate] for fate in ("duplicate", "rejected")}
    assert counts["in"] == counts["used"] + counts["duplicate"] + counts["rejected"], counts
    assert len(rows.examples) == sum(len(examples) for examples in splits.values()), counts
    return {
        "counts": counts,
        "splits": figures.get("splits", {}) | raw_figures,
        "hashes": {},
        "seal": "",
        "opened": 0,
        "reasons": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        "findings": check.findings(splits, spec.data.sizes, reasons, rows.unused + raw.unused)
        + _raw_findings(splits, raw),
        "labels": check.labels(splits),
        "near_duplicate": spec.data.near_duplicate,
        "seed": spec.seed,
        **{name: value for name, value in figures.items() if name != "splits"},
    }


def _raw_findings(splits: Mapping[str, Sequence[Example]], raw: texts.Texts) -> list[dict[str, str]]:
    leaked = texts.leaked(splits.get("test", ()), raw.splits.get(texts.TRAIN, ()))
    if not leaked:
        return []
    what = f"{leaked:,} test questions stand word for word in the raw text that is trained on"
    return [{"what": what, "fix": "take those documents out of data.text, or say so where the proof is shown"}]


def _figures(examples: Sequence[Example], lengths: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    tokens = [lengths[e.id][0] for e in examples]
    return {
        "rows": len(examples),
        "groups": len({e.group for e in examples}),
        "tokens": sum(tokens),
        "supervised_tokens": sum(lengths[e.id][1] for e in examples),
        "lengths": check.quantiles(tokens),
    }


def _write(
    work: Path,
    spec: config.Spec,
    task: Task,
    template: str | None,
    splits: Mapping[str, Sequence[Example | Document]],
    ledger: Sequence[dict[str, str]],
    dataset: dict[str, Any],
) -> None:
    """Writes the folder, dataset.json last, with the hashes of the others."""
    for name in splits:
        runs.write(work / f"{name}.jsonl", records.lines(splits[name]))
    if template:
        runs.write(work / TEMPLATE, template)
    runs.write(work / "ledger.jsonl", records.lines(ledger))
    runs.write_json(work / "task.json", dataclasses.asdict(task))
    sealed = work / ("test.jsonl" if spec.data.asks else f"{texts.TEST}.jsonl")
    dataset["seal"] = runs.sha256(sealed)
    runs.write(work / "card.md", card(spec, dataset))
    dataset["hashes"] = {n: runs.sha256(work / n) for n in FILES if n != "dataset.json" and (work / n).is_file()}
    runs.write_json(work / "dataset.json", dataset)


def card(spec: config.Spec, dataset: Mapping[str, Any]) -> str:
    """The data card: what the data is, whose it is, how it was made and what it cannot tell."""
    parts = [
        f"# Data of {spec.name}",
        f"Task: {spec.task.instruction.strip()}",
        f"## Source\n\n{_sources(spec.data, dataset)}",
        f"## Rows\n\n{_rows_table(dataset)}",
        f"## Splits\n\n{_splits_table(dataset)}",
    ]
    if "groups" in dataset:
        parts.append(f"## How the splits were made\n\n{_method(dataset)}")
    if raw := dataset["splits"].get(texts.TRAIN):
        parts.append(f"## Raw text\n\n{_raw_method(dataset, raw)}")
    parts += [f"## {field} in train, valid and test\n\n{_labels_table(v)}" for field, v in dataset["labels"].items()]
    if dataset["findings"]:
        parts.append("## Findings\n\n" + "\n".join(f"- {f['what']}. Fix: {f['fix']}." for f in dataset["findings"]))
    return "\n\n".join([*parts, f"## Limits\n\n{LIMITS}"]) + "\n"


LIMITS = """\
- Not checked: whether the labels are true, personal data, secrets, toxic language, the language of a text.
- Near duplicates are found by their words. A paraphrase in other words may stand in train and in test.
- The test rows are a sample of this source. They say nothing about inputs from elsewhere."""


def _sources(data: config.Data, dataset: Mapping[str, Any]) -> str:
    lines = []
    if data.package:
        lines.append(f"- package {data.package.name} {data.package.version}, sha256 {data.package.sha256}")
        lines += [f"  - its files `{pattern}`" for pattern in data.package.documents]
    lines += [f"- documents `{pattern}`" for pattern in data.documents]
    if "documents" in dataset:
        lines.append(
            f"- read by `{data.reader}`: {dataset['documents']:,} documents, of which"
            f" {dataset['documents_without_rows']:,} gave no row of their own"
        )
    lines += [f"- examples `{pattern}`" for pattern in data.examples]
    lines += [f"- raw text `{pattern}`" for pattern in data.text]
    lines += [f"- replay text `{pattern}`" for pattern in data.replay]
    credit = "\n".join(f"> {line}".rstrip() for line in (data.attribution or "").strip().splitlines())
    return "\n".join(lines) + (f"\n\nCredit:\n\n{credit}" if credit else "")


def _rows_table(dataset: Mapping[str, Any]) -> str:
    counts = dataset["counts"]
    lines = [
        f"{counts['in']:,} rows in = {counts['used']:,} used + {counts['duplicate']:,} duplicate"
        f" + {counts['rejected']:,} rejected. Each has its line in `ledger.jsonl`.",
        "",
        *_table(["not used because", "rows"], [[reason, f"{n:,}"] for reason, n in dataset["reasons"].items()]),
    ]
    return "\n".join(lines if dataset["reasons"] else lines[:1])


def _splits_table(dataset: Mapping[str, Any]) -> str:
    columns = ("rows", "groups", "tokens", "supervised_tokens")
    rows = [
        [name, *(f"{split[c]:,}" for c in columns), " / ".join(f"{n:,}" for n in split["lengths"].values())]
        for name, split in dataset["splits"].items()
    ]
    table = _table(["split", *columns, "tokens of a row: median / 90 % / 99 % / most"], rows)
    return "\n".join([*table, "", f"Seal of the test set: sha256 {dataset['seal']}"])


def _method(dataset: Mapping[str, Any]) -> str:
    groups = dataset["groups"]
    largest = ", ".join(f"{n:,}" for n in groups["largest"])
    return (
        "Rows with the same question and the same answer were kept once; where the same question had several answers,"
        " the most frequent was kept. Questions whose words and three-word runs have a Jaccard similarity of at least"
        f" {dataset['near_duplicate']:g} form a group, and so do rows of one document; case, white space and"
        f" punctuation do not count. The {groups['rows']:,} different rows form {groups['groups']:,} groups"
        f" ({groups['alone']:,} of one row; the largest: {largest}). A group is in one split only, chosen by a hash of"
        f" the group and the seed {dataset['seed']}; valid and test take one row of a group."
    )


def _raw_method(dataset: Mapping[str, Any], train: Mapping[str, Any]) -> str:
    return (
        f"{train['bytes']:,} bytes are trained on. Of documents whose words and three-word runs have a Jaccard"
        f" similarity of at least {dataset['near_duplicate']:g} the first stays. A document is in one split only, by a"
        f" hash of the document and the seed {dataset['seed']}; `{texts.TEST}` is read only to measure the bits per"
        " byte."
    )


def _labels_table(values: Mapping[str, Mapping[str, int]]) -> str:
    rows = [[f"`{value}`", *(f"{split.get(name, 0):,}" for name in NAMES)] for value, split in values.items()]
    return "\n".join(_table(["value", *NAMES], rows))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(_cells(r))} |" for r in rows)]


def _cells(row: Sequence[str]) -> list[str]:
    return [" ".join(cell.replace("|", "\\|").split())[:120] for cell in row]
