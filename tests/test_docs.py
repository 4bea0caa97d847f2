"""The documentation holds: generated pages are current, and what the pages name is there."""

from __future__ import annotations

import ast
import copy
import importlib.util
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from jsonschema import Draft202012Validator

import metier
from metier import cli, config
from metier.data.ingest import Found, Rejected
from metier.records import Document

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*/specialist.yaml"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Made by a run, so it may be absent from a checkout.
MAY_BE_ABSENT = {ROOT / "docs" / "report.png"}


def _generate() -> Any:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _generate()


def text(page: Path) -> str:
    return page.read_text("utf-8")


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The fenced blocks of a page in these languages."""
    yield from (m[2] for m in FENCE.finditer(text(page)) if m[1] in languages)


def inline(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text(page)))


def shell_lines(page: Path) -> list[list[str]]:
    return [w for b in blocks(page, "sh") for line in b.splitlines() if (w := shlex.split(line, comments=True))]


def test_tests_that_pages_name_are_there() -> None:
    named = {w for page in PAGES for w in inline(page) if w.startswith("tests/")}
    assert any("::" in w for w in named)
    for word in named:
        file, _, name = word.partition("::")
        assert (ROOT / file).exists(), word
        assert not name or f"def {name}(" in (ROOT / file).read_text("utf-8"), word


# Generated pages


def test_generated_pages_are_current() -> None:
    assert generate.stale() == [], f"run: {generate.MEND}"


def test_check_names_the_file_and_what_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    (tmp_path / "settings.md").write_text("old")
    (tmp_path / "commands.md").unlink()
    capsys.readouterr()
    assert generate.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert said == "".join(
        f"docs/{name} is out of date; fix: python docs/generate.py\n" for name in ("settings.md", "commands.md")
    )
    assert (tmp_path / "settings.md").read_text() == "old"


def test_every_setting_and_command_has_its_place() -> None:
    pages = generate.pages()
    for path, model in generate._models("", config.Spec):
        assert f"## {path or 'The top of the file'}\n" in pages["settings.md"]
        for name, field in model.model_fields.items():
            assert f"| `{field.alias or name}` |" in pages["settings.md"]
    for name in cli.commands.commands:
        assert f"## metier {name}\n" in pages["commands.md"]


# The schema


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = generate.schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.parent.name)
def test_the_schema_accepts_every_recipe(path: Path, validator: Draft202012Validator) -> None:
    written = config.parse(text(path), str(path))
    executed = yaml.safe_load(config.dump(config.load(path).spec))
    assert [e.message for tree in (written, executed) for e in validator.iter_errors(tree)] == []


@pytest.mark.parametrize(
    "path", ["", "task", "data", "data.sizes", "data.package", "train.0", "prove", "prove.claims.0"]
)
def test_the_schema_refuses_an_unknown_key(path: str, validator: Draft202012Validator) -> None:
    tree = config.parse(text(RECIPES[0]), "recipe")
    at: Any = tree
    for name in filter(None, path.split(".")):
        at = at[int(name)] if name.isdigit() else at[name]
    at["rnk"] = 8
    assert any("rnk" in e.message for e in validator.iter_errors(tree))


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "A B"},
        {"seed": -1},
        {"base_sha256": "abc"},
        {"train": []},
        {"train": [{"rank": 0}]},
        {"train": [{"max_length": 7}]},
        {"train": [{"method": "magic"}]},
        {"prove": {"confidence": 1}},
        {"prove": {"claims": [{"beats": "everyone"}]}},
        {"machine": {"device": "abacus"}},
        {"task": {}},
    ],
    ids=str,
)
def test_the_schema_refuses_what_loading_refuses(wrong: dict[str, Any], validator: Draft202012Validator) -> None:
    tree = copy.deepcopy(config.parse(text(RECIPES[0]), "recipe")) | wrong
    assert not validator.is_valid(tree)
    with pytest.raises(config.ConfigError):
        config.validate(tree, "recipe")


# What the pages name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_exist(page: Path) -> None:
    """Command lines are parsed by the commands themselves, which then are not run."""
    for words in shell_lines(page):
        if Path(words[0]).name == "metier":
            words = words[1 : words.index(">")] if ">" in words else words[1:]
            command = cli.commands.commands[words[0]]
            try:
                command.make_context(words[0], words[1:])
            except click.ClickException as error:
                pytest.fail(f"{page.name}: {' '.join(words)}: {error.format_message()}")
    named = [w.split()[1] for w in inline(page) if re.match(r"(\.venv/bin/)?metier [a-z]", w)]
    assert set(named) <= set(cli.commands.commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_exist(page: Path) -> None:
    known = {o for c in cli.commands.commands.values() for p in c.params for o in p.opts} | {"--help", "--check"}
    named = [w.split()[0].partition("=")[0] for w in inline(page) if w.startswith("--")]
    assert set(named) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text(ROOT / "Makefile"), re.MULTILINE))
    lines = [*shell_lines(page), *(w.split() for w in inline(page))]
    assert {t for words in lines if words[0] == "make" for t in words[1:]} <= targets


def test_the_test_command_is_stated() -> None:
    assert ["make", "test"] in shell_lines(ROOT / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_set_examples_are_settings(page: Path) -> None:
    for words in [*shell_lines(page), *(i.split() for i in inline(page))]:
        for word, setting in itertools.pairwise(words):
            if word == "--set" and setting != "KEY=VALUE":
                config.load(RECIPES[0], [setting])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text(page))):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists() or target in MAY_BE_ABSENT, f"{page.name}: {link}"
        if anchor:
            assert anchor in _anchors(target), f"{page.name}: {link}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_every_page_is_in_the_site() -> None:
    site = yaml.safe_load(text(ROOT / "mkdocs.yml"))
    listed = re.findall(r"[\w-]+\.md", str(site["nav"]))
    assert sorted(listed) == sorted(p.name for p in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_examples_name_what_is_there(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "metier":
                assert node.attr in metier.__all__


def test_the_reader_in_the_data_page_reads() -> None:
    (block,) = blocks(ROOT / "docs" / "data.md", "python")
    names: dict[str, Any] = {}
    exec(block, names)
    documents = [Document("1", "a.txt", "topic: soil\n\nIt is dry."), Document("2", "b.txt", "dry")]
    assert list(names["examples"](documents)) == [
        Found("a.txt", "It is dry.", {"topic": "soil"}),
        Rejected("b.txt", "no topic: the first line does not name one"),
    ]
