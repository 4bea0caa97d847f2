"""Every setting, declared once.

`load` reads a `specialist.yaml` into a frozen `Spec`. The text of each field is its documentation: `docs/settings.md`
and the JSON Schema for editors are generated from here. An unknown key is refused with the nearest name, and every
setting is read by some act.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from metier.errors import ConfigError, nearest

MAX_BYTES = 1 << 20
MAX_DEPTH = 24
PACK = 1024
TEMPLATES = ("chatml",)
NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number, not yes or no")
    return value


Number = Annotated[float, BeforeValidator(_no_bool)]
Count = Annotated[int, BeforeValidator(_no_bool)]
Weight = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=1e6)]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def _at_default(settings: Settings) -> set[str]:
    """Fields given with their default value: what a written-out specialist holds."""
    fields = type(settings).model_fields
    return {n for n in settings.model_fields_set if getattr(settings, n) == fields[n].default}


class Task(Settings):
    """What the specialist does."""

    instruction: str = Field(min_length=1, description="What the model is told before each input, in every arm.")
    schema_file: str | None = Field(
        None, alias="schema", description="JSON Schema of a valid answer; a file beside the specialist."
    )
    prompt: str | None = Field(
        None,
        description="The best prompt you can write: a text file beside the specialist, used by the arms `prompt` and "
        "`few-shot`. Without it, the instruction with the schema and its allowed values is used.",
    )
    shots: Count = Field(3, ge=1, le=32, description="Nearest training examples shown by the arm `few-shot`.")
    template: str | None = Field(
        None,
        min_length=1,
        description="Chat template for a base that has none, or in place of its own: `chatml`, or a Jinja file beside "
        "the specialist. It may only use control tokens of the base's vocabulary, and is shipped with the adapter.",
    )


class Package(Settings):
    """Data that comes as a Python package; only its files are read, its code never runs."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name in the package index.")
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+!-]*$", description="The exact version.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Hash of the wheel; anything else is refused.")
    documents: tuple[str, ...] = Field(min_length=1, description="Patterns of the files inside the package.")


class Sizes(Settings):
    """Rows of each split."""

    train: Count = Field(1000, ge=1, description="Most training rows.")
    valid: Count = Field(150, ge=1, description="Validation rows.")
    test: Count = Field(400, ge=1, description="Sealed test rows.")


class Data(Settings):
    """Where examples come from and how they are split."""

    documents: tuple[str, ...] = Field((), description="Text files (patterns such as `notes/**/*.txt`) for the reader.")
    package: Package | None = Field(None, description="A package whose files are the documents.")
    reader: str | None = Field(
        None,
        description="A Python file beside the specialist with `examples(documents)`; it runs with your rights.",
    )
    examples: tuple[str, ...] = Field(
        (), description="JSON Lines files of examples: messages, prompt/completion or instruction/output."
    )
    mix: dict[str, Weight] = Field(
        {},
        description="Weights of the sources in training, such as {chat.jsonl: 1, sql.jsonl: 3}: an epoch draws each in "
        "proportion to its weight. Keys are the entries of `examples`, and `documents` for what the reader finds; give "
        "all or none. Without weights every row is drawn once an epoch.",
    )
    truncate: bool = Field(
        False,
        description="Whether the last question of a row that is too long is cut at its end, with a line in the ledger. "
        "Otherwise such a row is rejected.",
    )
    text: tuple[str, ...] = Field(
        (),
        description="Raw text for the method `cpt`: patterns of text or Markdown files, each one document, and of JSON "
        "Lines files with a `text` a line.",
    )
    replay: tuple[str, ...] = Field(
        (),
        description="General text, in the same forms, that the method `cpt` mixes in by its `replay`. Without it, the "
        "base model's own samples.",
    )
    held_out: Number = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of the raw text's documents that is not trained on: half for validation, half sealed, for "
        "the bits per byte before and after.",
    )
    sizes: Sizes = Field(default_factory=Sizes, description="Rows of each split.")
    near_duplicate: Number = Field(
        0.8, gt=0, le=1, description="Jaccard similarity from which two inputs belong to one group."
    )
    balance: str | None = Field(
        None,
        min_length=1,
        description="A field of the answers whose rare values training should see more often: each value comes by the "
        "square root of its number. Test and validation are untouched.",
    )
    max_rejected: Number = Field(
        1.0, ge=0, le=1, description="Share of input rows that may be rejected before the build stops."
    )
    attribution: str | None = Field(None, description="Credit that the data's licence asks for; printed on the cards.")

    @model_validator(mode="after")
    def _has_a_source(self) -> Data:
        if not (self.asks or self.text):
            raise ValueError("no source: give documents, package, examples or text")
        if (self.documents or self.package) and not self.reader:
            raise ValueError("documents need a reader that turns them into examples; raw text belongs in data.text")
        return self

    @model_validator(mode="after")
    def _mix_names_the_sources(self) -> Data:
        sources = {*self.examples, *(["documents"] if self.documents or self.package else [])}
        if self.mix and (wrong := sorted(sources ^ self.mix.keys())):
            known = "has no weight in data.mix" if wrong[0] in sources else "in data.mix is no entry of data.examples"
            raise ValueError(f"{wrong[0]!r} {known}; give every source a weight: {', '.join(sorted(sources))}")
        return self

    @property
    def asks(self) -> bool:
        """Whether there are questions with answers: what every method but `cpt` learns from, and what is proved on."""
        return bool(self.documents or self.package or self.examples)


class Stage(Settings):
    """One stage of training; each starts from the last."""

    method: Literal["sft", "constrained-sft", "distill", "self-distill", "cpt"] = Field(
        "sft",
        description="`sft`: supervised fine-tuning on the answers. `constrained-sft`: the same, with the first tokens "
        "of an answer held near the base. `distill`: a larger model's probabilities at the tokens of the answers. "
        "`self-distill`: the base's own probabilities with the answer shown to it, at tokens that the specialist draws "
        "itself. `cpt`: continued pre-training on `data.text`.",
    )
    tune: Literal["lora", "full"] = Field(
        "lora", description="What is trained: `lora`, an adapter on the frozen base; `full`, every weight of the base."
    )
    rank: Count = Field(16, ge=1, le=4096, description="Rank of the LoRA update.")
    alpha: Number = Field(32, gt=0, le=1e6, description="LoRA scale: the update counts alpha / rank.")
    rslora: bool = Field(False, description="rsLoRA: the update counts alpha / √rank instead.")
    dora: bool = Field(False, description="DoRA: the length of each weight row is trained apart from its direction.")
    dropout: Number = Field(0, ge=0, lt=1, description="Share of an adapter's inputs that a step drops.")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="Modules that get an adapter: `all-linear`, or names such as [q_proj, v_proj]."
    )
    modules_to_save: tuple[str, ...] = Field(
        (),
        description="Modules trained whole beside the adapter, such as [embed_tokens, lm_head]. As in PEFT, a name "
        "means every module whose full name ends so. Tied ones must be named together.",
    )
    quantize: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="Bits of the frozen base's linear layers while training: `nf4` 4 bits, `int8` 8 bits, `none` as "
        "released. The adapter is proved and shipped on the base as released.",
    )
    learning_rate: Number | None = Field(
        None,
        gt=0,
        le=1,
        description="Peak learning rate. Unset: by the method, the width of the base and `tune`; plan.json says which.",
    )
    epochs: Number = Field(2, gt=0, le=1000, description="Passes over the training rows, or packed rows in `cpt`.")
    batch_size: Count = Field(16, ge=1, le=65536, description="Rows per optimizer step.")
    warmup: Number = Field(0.03, ge=0, lt=1, description="Share of steps with a rising learning rate; then cosine.")
    weight_decay: Number = Field(0, ge=0, le=1, description="AdamW weight decay of what is trained; matrices only.")
    clip: Number = Field(1.0, gt=0, le=1e6, description="Largest gradient norm.")
    max_length: Count | None = Field(
        None,
        ge=8,
        description="Most tokens of a row, at most the base's context, which is also what it is where unset. Longer "
        "rows are rejected when the data is built (see `data.truncate`). In `cpt` documents are split into pieces of "
        "so many tokens and packed into rows of as many; unset: 1024, or the context where that is smaller.",
    )
    replay: Number = Field(
        0,
        ge=0,
        lt=1,
        description="`cpt` only: share of the tokens that is general text, from `data.replay` or the base's own "
        "samples, against forgetting.",
    )
    validations: Count = Field(4, ge=0, le=1000, description="Validation passes spread over the stage.")
    patience: Count = Field(
        2, ge=0, le=1000, description="Validations without a better loss before stopping early; 0 never stops."
    )
    checkpoint_every: Count = Field(
        10, ge=1, le=100_000, description="Steps between checkpoints. Unset with `tune: full`: 50, as they are large."
    )
    dft: bool = Field(
        False,
        description="`sft`: weights each token by its own probability, so that unlikely ones pull less (dynamic "
        "fine-tuning).",
    )
    teacher: str | None = Field(
        None, min_length=1, description="`distill`: the teacher, named as `base` is; it must have the same tokenizer."
    )
    beta: Number = Field(
        0,
        ge=0,
        le=1,
        description="`distill`: which divergence from the teacher is lowered. 0 is KL(teacher, student), 1 is "
        "KL(student, teacher), between them lies the generalised Jensen-Shannon divergence.",
    )
    temperature: Number = Field(
        1, gt=0, le=100, description="`distill`: divides the logits of teacher and student; above 1 evens them out."
    )
    top_k: Count = Field(
        64,
        ge=1,
        le=1 << 20,
        description="`distill`, `self-distill`: tokens of the teacher kept at each position, the answer's own among "
        "them; all others count as one.",
    )
    draw_every: Count = Field(
        4, ge=1, le=100_000, description="`self-distill`: steps that share one round of drawn answers."
    )
    ratio_clip: Number = Field(
        2,
        ge=1,
        le=1e6,
        description="`self-distill`: the most that a token may count for being likelier now than when it was drawn.",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_full_tuning(cls, given: Any) -> Any:
        full = isinstance(given, dict) and given.get("tune") == "full"
        return {"checkpoint_every": 50} | given if full else given

    @model_validator(mode="after")
    def _variants_go_together(self) -> Stage:
        adapter = {"rank", "alpha", "rslora", "dora", "dropout", "targets", "modules_to_save", "quantize"}
        if self.tune == "full" and (strange := sorted(adapter & self.model_fields_set - _at_default(self))):
            raise ValueError(f"{strange[0]} means nothing with tune: full")
        if self.dora and self.dropout:
            raise ValueError("dora and dropout do not go together: DoRA's row lengths need the whole input")
        if not self.targets:
            raise ValueError("targets names no module: give names, or all-linear")
        return self

    @model_validator(mode="after")
    def _settings_of_the_method(self) -> Stage:
        own = {
            "sft": {"dft"},
            "constrained-sft": set(),
            "cpt": {"replay"},
            "distill": {"teacher", "beta", "temperature", "top_k"},
            "self-distill": {"top_k", "draw_every", "ratio_clip"},
        }
        for name in sorted(set[str]().union(*own.values()) - own[self.method]):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} means nothing in the method {self.method}")
        if self.method == "self-distill" and self.tune == "full":
            raise ValueError("self-distill needs tune: lora, because its teacher is the model without the adapter")
        if self.method == "distill" and self.teacher is None:
            raise ValueError("the method distill needs a teacher: name a base as in `base`")
        return self

    def limit(self, context: int | None) -> int | None:
        """Most tokens of a row for a base that takes `context` tokens; None where nothing limits it."""
        if self.max_length and context and self.max_length > context:
            raise ConfigError(
                f"max_length {self.max_length:,} is over the base's context of {context:,} tokens",
                where="train.max_length",
                fix=f"use at most {context}, or a base with a longer context",
            )
        if self.method == "cpt":
            return self.max_length or min(PACK, context or PACK)
        return self.max_length or context


# The same weights are trained in all stages, so these are the same in each.
TRAINED = ("tune", "rank", "alpha", "rslora", "dora", "dropout", "targets", "modules_to_save", "quantize")


class Claim(Settings):
    """One claim the proof must establish; exactly one of `beats` and `format`."""

    beats: Literal["base", "prompt", "few-shot"] | None = Field(None, description="`tuned` beats this arm.")
    format: Literal["valid"] | None = Field(None, description="`tuned` answers are valid against the schema.")
    grader: str = Field(
        "all",
        pattern="^(all|json|schema|field:.+)$",
        description="What a `beats` claim counts: `all` right, `field:<name>` right, `json` parses, `schema` valid.",
    )
    margin: Number = Field(0.02, ge=0, lt=1, description="Smallest estimate a `beats` claim accepts.")
    at_least: Number = Field(0.99, gt=0, le=1, description="Smallest share of valid answers a `format` claim accepts.")

    @model_validator(mode="after")
    def _exactly_one(self) -> Claim:
        if (self.beats is None) == (self.format is None):
            raise ValueError("a claim has exactly one of: beats, format")
        other = {"grader", "margin"} if self.format else {"at_least"}
        if strange := sorted(other & self.model_fields_set - _at_default(self)):
            raise ValueError(f"{strange[0]} means nothing in the claim `{self.name}`")
        return self

    @property
    def name(self) -> str:
        return f"beats: {self.beats}" if self.beats else f"format: {self.format}"


Arm = Literal["base", "prompt", "few-shot", "tuned"]
ARMS: tuple[Arm, ...] = ("base", "prompt", "few-shot", "tuned")


class Prove(Settings):
    """What is claimed and how it is measured; hashed before training."""

    arms: tuple[Arm, ...] = Field(ARMS, description="Systems compared.")
    claims: tuple[Claim, ...] = Field(
        (Claim(beats="prompt"), Claim(beats="few-shot")),  # type: ignore[call-arg]
        min_length=1,
        description="What must hold for the verdict `ship`.",
    )
    confidence: Number = Field(0.95, gt=0.5, lt=1, description="Confidence of every interval.")
    max_new_tokens: Count = Field(64, ge=1, le=32768, description="Most tokens of an answer.")
    constrained: bool = Field(
        False,
        description="Whether answers are constrained to the task's schema while they are written, in every arm alike: "
        "form is then given, and arms differ in content.",
    )
    temperature: Number = Field(0, ge=0, le=10, description="0 is greedy.")
    top_p: Number = Field(1, gt=0, le=1, description="Nucleus sampling, where the temperature is above 0.")

    @model_validator(mode="after")
    def _arms_are_there(self) -> Prove:
        missing = {c.beats for c in self.claims if c.beats} - set(self.arms)
        if missing or "tuned" not in self.arms:
            raise ValueError(f"claims need the arms {sorted(missing | {'tuned'})}: add them to prove.arms")
        return self


class Ship(Settings):
    """What is released."""

    formats: tuple[Literal["adapter", "model"], ...] | None = Field(
        None,
        min_length=1,
        description="`adapter`: PEFT layout; `model`: the whole model, where every weight was trained. Unset: the one "
        "that was trained.",
    )
    unproved: bool = Field(False, description="Release although the verdict is not `ship`; the card says so.")
    license: str = Field("apache-2.0", min_length=1, description="Licence named on the model card.")


class Machine(Settings):
    """How this machine is used; none of these changes what is learnt beyond rounding."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where tensors live.")
    dtype: Literal["auto", "bf16", "fp32"] = Field("auto", description="`auto` measures which is faster here.")
    threads: Count = Field(0, ge=0, le=1024, description="CPU threads; 0 uses every core this process may use.")
    tokens: Count = Field(
        0, ge=0, le=1 << 20, description="Tokens computed at once in training; 0 lets the plan decide."
    )
    dollars_per_hour: Number = Field(0.10, ge=0, le=10_000, description="Price of this machine, for the cost figures.")
    on: Literal["local", "ray"] = Field(
        "local",
        description="Who starts the processes that train: `local`: you do, one or, with `torchrun`, several; `ray`: a "
        "Ray cluster, which is started on this machine where none is running.",
    )
    workers: Count = Field(1, ge=1, le=4096, description="Processes that train, with `on: ray`.")
    shard: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether several processes spread the frozen base over all of them (FSDP2) instead of holding a "
        "copy each; `auto`: on GPUs, where the plan says that a copy does not fit.",
    )
    timeout_seconds: Count = Field(
        600, ge=1, le=86_400, description="Longest wait of one process for another before training ends with an error."
    )

    @model_validator(mode="after")
    def _workers_are_started_by_ray(self) -> Machine:
        if self.on == "local" and self.workers != 1:
            raise ValueError(
                "workers are started with `on: ray`; several local processes by "
                f"`torchrun --nproc-per-node {self.workers} -m metier train SPEC`"
            )
        return self


Tracker = Literal["tensorboard", "mlflow", "wandb", "trackio"]


class Spec(Settings):
    """One specialist: what it does, what it learns from, what must be proved."""

    name: str = Field(pattern=NAME, description="Name of the run folder: a-z, 0-9, dot, dash, underscore.")
    base: str = Field(
        "smollm2-135m",
        min_length=1,
        description="`smollm2-135m` (embedded), a hub id, a local folder, or a .gguf file.",
    )
    base_sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="Expected hash of the base's weights; another hash is refused."
    )
    seed: Count = Field(0, ge=0, lt=2**63, description="Seed of sampling, initialisation and order.")
    task: Task
    data: Data
    train: tuple[Stage, ...] = Field(
        (Stage(),),  # type: ignore[call-arg]
        min_length=1,
        max_length=16,
        description="Stages of training, in order; each goes on with the weights of the last. What is "
        "trained (`tune` and the adapter's shape) is given in the first and is the same in all.",
    )
    prove: Prove = Field(default_factory=Prove, description="The proof.")
    ship: Ship = Field(default_factory=Ship, description="The release.")
    machine: Machine = Field(default_factory=Machine, description="How this machine is used.")
    track: tuple[Tracker, ...] = Field(
        (),
        description="Trackers that show the training's metrics beside `metrics.jsonl`: `tensorboard`, `mlflow`, "
        "`wandb`, `trackio`; each is an extra of its name. See [Tracking](tracking.md).",
    )

    @field_validator("track")
    @classmethod
    def _named_once(cls, names: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
        if len(set(names)) != len(names):
            raise ValueError("a tracker is named twice")
        return names

    @model_validator(mode="after")
    def _format_has_a_schema(self) -> Spec:
        needed = self.prove.constrained or any(c.format or c.grader == "schema" for c in self.prove.claims)
        if self.task.schema_file is None and needed:
            raise ValueError("prove.constrained and claims about the format need task.schema")
        return self

    @model_validator(mode="after")
    def _ships_what_is_trained(self) -> Spec:
        made = "model" if self.train[-1].tune == "full" else "adapter"
        if other := [f for f in self.ship.formats or () if f != made]:
            raise ValueError(f"ship.formats: {other[0]} is not what tune: {self.train[-1].tune} makes; it is {made}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _later_stages_train_the_same(cls, values: Any) -> Any:
        """A later stage that does not say what is trained trains what the first does."""
        stages = values.get("train") if isinstance(values, dict) else None
        if not isinstance(stages, (list, tuple)) or not all(isinstance(s, dict) for s in stages):
            return values
        first = {k: stages[0][k] for k in TRAINED if k in stages[0]} if stages else {}
        return {**values, "train": [first | s for s in stages]}

    @model_validator(mode="after")
    def _stages_train_the_same(self) -> Spec:
        for place, stage in enumerate(self.train):
            for key in TRAINED:
                first, own = getattr(self.train[0], key), getattr(stage, key)
                if own != first:
                    raise ValueError(
                        f"train.{place}.{key} is {own}, train.0.{key} is {first}: all stages train the same weights"
                    )
        return self

    @model_validator(mode="after")
    def _stages_have_their_data(self) -> Spec:
        for place, stage in enumerate(self.train):
            if stage.method == "cpt" and not self.data.text:
                raise ValueError(f"train.{place} continues pre-training and needs data.text")
            if stage.method != "cpt" and not self.data.asks:
                hint = "; raw text is learnt by the method cpt" if self.data.text else ""
                raise ValueError(
                    f"train.{place} ({stage.method}) needs data.examples, or documents with a reader{hint}"
                )
        if self.data.text and not any(s.method == "cpt" for s in self.train):
            raise ValueError("data.text is learnt by the method cpt: add `- method: cpt` to train")
        if self.data.replay and not any(s.replay for s in self.train):
            raise ValueError("data.replay is mixed in by a cpt stage: give it `replay`, such as 0.05")
        return self


class Loaded(BaseModel):
    """A `Spec` and the folder its relative paths start from."""

    model_config = ConfigDict(frozen=True)
    spec: Spec
    folder: Path

    def path(self, name: str) -> Path:
        """A file the specialist names, which must lie in its own folder or be given as an absolute path."""
        return (self.folder / name).resolve()


def load(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """The specialist of a YAML file, or of a folder that holds `specialist.yaml`, with `key=value` overrides."""
    file = Path(path)
    file = file / "specialist.yaml" if file.is_dir() else file
    tree = parse(_read(file), str(file))
    for override in overrides:
        _override(tree, override)
    return Loaded(spec=validate(tree, str(file)), folder=file.parent.resolve())


def validate(tree: dict[str, Any], where: str) -> Spec:
    try:
        return Spec.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, where) from error


def dump(spec: Spec) -> str:
    """The settings as executed, every default written out, as YAML."""
    return yaml.safe_dump(tree(spec), sort_keys=False, allow_unicode=True, width=100)


def tree(settings: BaseModel) -> dict[str, Any]:
    """Settings as plain JSON values under their YAML names."""
    return settings.model_dump(mode="json", by_alias=True)


def dotted(tree: Any, path: str = "") -> dict[str, Any]:
    """{key as `--set` takes it: value} of settings as plain values; a list of plain values is one value."""
    if isinstance(tree, list) and any(isinstance(item, (dict, list)) for item in tree):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for name, inner in tree.items() for k, v in dotted(inner, f"{path}.{name}".lstrip(".")).items()}


def registration(spec: Spec, task: dict[str, Any]) -> dict[str, Any]:
    """What the proof claims and how it measures, with its hash: written down before training, compared after.

    `task` is the data set's `task.json`: the instruction, schema and prompt themselves, not the names of their files.
    """
    stated = {"task": task, "prove": tree(spec.prove)}
    text = json.dumps(stated, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return {"registered": hashlib.sha256(text.encode()).hexdigest(), **stated}


def parse(text: str, where: str) -> dict[str, Any]:
    """YAML as a dict: no tags, aliases, duplicate keys or scalars that YAML 1.1 would silently turn into others."""
    try:
        events = list(_guarded(text, where))
        loaded = yaml.load(text, Loader=_Loader) if events else None  # noqa: S506 (a SafeLoader with less)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise ConfigError(f"not YAML: {problem}", where=place, fix="check the indentation and quotes there") from error
    if loaded is None:
        raise ConfigError(
            "the settings are empty", where=where, fix="start from a recipe: metier new licence-clerk DIR"
        )
    if not isinstance(loaded, dict):
        raise ConfigError(
            "the settings are not a mapping", where=where, fix="write `name: ...` and so on, a key a line"
        )
    return loaded


def _read(file: Path) -> str:
    try:
        if not file.exists():
            raise ConfigError(
                f"no settings at {file}", where=str(file), fix="give a specialist.yaml, or the folder that holds one"
            )
        if not file.is_file():
            raise ConfigError("not a regular file", where=str(file), fix="give a specialist.yaml")
        if file.stat().st_size > MAX_BYTES:
            raise ConfigError(f"settings over {MAX_BYTES:,} bytes", where=str(file), fix="data belongs in data files")
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"byte {error.start} is not UTF-8", where=str(file), fix="save the file as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(file), fix="check its permissions") from error


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core scalars: 1e-4 is a number, `no` and 12:30 are texts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a plain text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} stands twice, in lines {seen[key.value]} and {line}", key.start_mark
                )
            seen[str(key.value)] = line
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
    ("float", r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|nan)$", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))
_Loader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda loader, node: _yaml_float(str(node.value)),
)


def _yaml_float(text: str) -> float:
    bare = text.replace("_", "").lower()
    return {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}.get(bare) or float(
        bare.replace(".nan", "nan")
    )


def _guarded(text: str, where: str) -> Iterator[object]:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        place = f"{where}:{event.start_mark.line + 1}" if event.start_mark else where
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError("YAML anchors and aliases are not used here", where=place, fix="write the value out")
        if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)) and event.tag not in (None, "!"):
            raise ConfigError(f"the tag {event.tag} is refused", where=place, fix="write plain values")
        plain = event.value if isinstance(event, yaml.ScalarEvent) and event.style is None else ""
        if re.fullmatch(r"[-+]?0[0-9]+", plain):
            raise ConfigError(f"{plain} may mean two numbers", where=place, fix="drop the leading zero, or quote it")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError(f"nested deeper than {MAX_DEPTH} levels", where=place, fix="flatten the settings")
        yield event


def _override(tree: dict[str, Any], text: str) -> None:
    """Applies `train.0.rank=8` or `train.rank=8` (the only stage) to the tree."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ConfigError(f"--set {text!r} is not key=value", where="--set", fix="for example --set train.rank=8")
    at: Any = tree
    *path, last = key.split(".")
    for name in path:
        at = _step(at, name, key)
    new = parse(f"value: {value}", f"--set {key}")["value"]
    if isinstance(at, list) and last.isdigit() and int(last) < len(at):
        at[int(last)] = new
        return
    at = _only(at, key) if isinstance(at, list) else at
    if not isinstance(at, dict):
        raise ConfigError(f"{key} has no place in the settings", where="--set", fix="see docs/settings.md")
    at[last] = new


def _step(at: Any, name: str, key: str) -> Any:
    if isinstance(at, list):
        if name.isdigit() and int(name) < len(at):
            return at[int(name)]
        return _step(_only(at, key), name, key)
    if not isinstance(at, dict):
        raise ConfigError(f"{key} has no place in the settings", where="--set", fix="see docs/settings.md")
    if name == "train" and name not in at:
        return at.setdefault(name, [{}])
    return at.setdefault(name, {})


def _only(items: list[Any], key: str) -> Any:
    if len(items) != 1:
        raise ConfigError(f"{key} could mean {len(items)} entries", where="--set", fix="number it: train.0.rank=8")
    return items[0]


def _explain(error: ValidationError, where: str) -> ConfigError:
    """The first problem as one sentence, with the nearest known name or the allowed range."""
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = problems[0]
    place = ".".join(str(p) for p in first["loc"] if p not in ("function-after",))
    if first["type"] == "extra_forbidden":
        owner = _owner(first["loc"])
        known = {f.alias or n for n, f in owner.model_fields.items()}
        name = str(first["loc"][-1])
        return ConfigError(f"{place} is not a setting", where=where, fix=nearest(name, known))
    if first["type"] == "missing":
        return ConfigError(f"{place} is missing", where=where, fix=f"add `{first['loc'][-1]}:`; see docs/settings.md")
    shown = "" if isinstance(first["input"], dict) else f" (it is {str(first['input'])[:60]!r})"
    message = first["msg"].removeprefix("Value error, ")
    return ConfigError(
        f"{place or 'settings'}: {message}{shown}", where=where, fix="see docs/settings.md for its range"
    )


def _owner(location: tuple[int | str, ...]) -> type[BaseModel]:
    """The settings class in which the last name of an error's location was looked up."""
    owner: type[BaseModel] = Spec
    for name in location[:-1]:
        for field_name, field in owner.model_fields.items():
            if name in (field_name, field.alias):
                owner = _settings_in(field.annotation) or owner
    return owner


def _settings_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_settings_in(a) for a in getattr(annotation, "__args__", ()))
    return next((i for i in inner if i), None)
