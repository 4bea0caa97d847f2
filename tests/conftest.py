"""What tests share: a tiny model and tokenizer made on the spot, a tiny specialist, and a cache of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no failure, and what was found once is found again.
settings.register_profile("metier", deadline=None, derandomize=True)
settings.load_profile("metier")

os.environ.setdefault("METIER_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models gain nothing from threads, and two suites at once would wait for each other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# What a family needs beside the common settings for its own traits to show in a model of two layers and short rows.
FAMILIES: dict[str, dict[str, object]] = {
    "gemma2": {
        "sliding_window": 4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 10,
    },
    "gemma3_text": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 10,
    },
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "mistral": {"sliding_window": None},
    "phi3": {"partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layers": [1, 0]},
}


def rotary(kind: str, **settings: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **settings}}


# Configurations of some families that take a path of their own; windows are shorter than the tests' rows.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "untied": ("llama", {"tie_word_embeddings": False}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral with a window": ("mistral", {"sliding_window": 4}),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3 with a window": ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "smollm3 with a window": ("smollm3", {"use_sliding_window": True, "sliding_window": 4}),
    "phi3 with a window": ("phi3", {"sliding_window": 4, "partial_rotary_factor": 1.0}),
    "window of one": ("mistral", {"sliding_window": 1}),
    "one residual after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "dynamic": ("llama", rotary("dynamic", factor=2.0)),
    "linear": ("llama", rotary("linear", factor=2.0)),
    "yarn": ("qwen2", rotary("yarn", factor=4.0, original_max_position_embeddings=128)),
    "llama3": (
        "llama",
        rotary("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 140,
            "partial_rotary_factor": 1.0,
            **rotary("longrope", short_factor=[1.0, 1.5, 2.0, 3.0], long_factor=[1.0, 2.0, 4.0, 8.0]),
        },
    ),
}
COLOURS = ("red", "green", "blue", "amber")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes the user's cache; every process of the suite shares one measurement of the machine."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    folder.mkdir(exist_ok=True)
    os.environ["METIER_CACHE"] = str(folder)


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(['{"colour":"red"}', "the apple is green", "system user assistant"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHATML)


def write_model(folder: Path, kind: str = "llama", **changes: object) -> Path:
    """A random-weight model of two layers in `folder`, with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, object] = {
        "vocab_size": 384,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "initializer_range": 0.25,
    }
    settings |= FAMILIES.get(kind, {}) | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    if kind != "llama" or changes:  # norms of one and biases of zero would hide a mistake
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_base(folder: Path, name: str) -> Path:
    """A model of the family or variant `name`."""
    kind, changes = VARIANTS.get(name, (name, {}))
    return write_model(folder, kind, **changes)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama."""
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def renderer(tiny: Path):
    from metier.text.chat import Renderer

    return Renderer(tiny)


def write_specialist(folder: Path, base: Path | str, *, rows: int = 60, **changes: object) -> Path:
    """A specialist that names the colour in a sentence; small enough to train in a second."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "pairs.jsonl").open("w") as file:
        for n in range(rows):
            colour = COLOURS[n % len(COLOURS)]
            text = f"thing {n * 7919 % 1009} of lot {n} beside {n * 31 % 97} is {colour}"
            file.write(json.dumps({"prompt": text, "completion": json.dumps({"colour": colour})}) + "\n")
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": list(COLOURS)}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    (folder / "schema.json").write_text(json.dumps(schema))
    settings: dict[str, object] = {
        "name": "colours",
        "base": str(base),
        "task": {"instruction": "Name the colour as JSON.", "schema": "schema.json", "shots": 2},
        "data": {
            "examples": ["pairs.jsonl"],
            "sizes": {"train": rows // 2, "valid": 6, "test": 12},
            "near_duplicate": 1,
        },
        "train": [{"rank": 4, "alpha": 8, "learning_rate": 0.01, "epochs": 2, "batch_size": 4, "checkpoint_every": 3}],
        "prove": {"max_new_tokens": 12},
        "machine": {"dtype": "fp32", "threads": 1},
    }
    (folder / "specialist.yaml").write_text(yaml.safe_dump(settings | changes, sort_keys=False))
    return folder


@pytest.fixture
def specialist(tmp_path: Path, tiny: Path) -> Path:
    return write_specialist(tmp_path / "colours", tiny)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden vectors and checks that lies beside some checkouts."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the shared folder of golden vectors is not beside this checkout")
    return folder
