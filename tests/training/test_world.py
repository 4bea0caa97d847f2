"""Two processes train as one does: the same losses and adapter; one that dies, disagrees or is stopped ends both."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import metier
from conftest import write_specialist
from metier import runs
from metier.errors import ConfigError, MetierError, NumericError, ResourceError, Terminated, recorded
from metier.models import load, lora
from metier.text import batches
from metier.text.batches import Row
from metier.training import loop, workers, world
from metier.training.plan import Load, Shape, plan, spread

ADAPTER = "colours/train/adapter/adapter_model.safetensors"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "metier.training.run",
        "metier.acts",
        "metier.evaluate.metrics",
        "metier.models.block",
        "matplotlib.backends.backend_svg",
        "torch.distributed.device_mesh",
        "torch.distributed.fsdp",
        "transformers.models.llama.modeling_llama",
    ]
)


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {k: str(v) for k, v in numbers.items()} | {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _process(work: Callable[..., None], environment: dict[str, str], said: str, words: tuple[Any, ...]) -> None:
    """A child: does `work`, writes down the error it met, and exits as the command line would."""
    os.environ |= environment
    try:
        work(*words)
    except MetierError as error:
        Path(said).write_text(json.dumps(error.record()))
        sys.exit(error.exit_code)
    except Terminated:
        sys.exit(143)


def _together(folder: Path, work: Callable[..., None], *words: tuple[Any, ...]) -> tuple[list[int], list[dict]]:
    """Exit codes and errors of as many processes as there are words, which run `work(*words)` as one world."""
    port, size = _port(), len(words)
    said = [folder / f"said-{port}-{rank}" for rank in range(size)]
    children = [
        CONTEXT.Process(target=_process, args=(work, _environment(rank, size, port), str(said[rank]), words[rank]))
        for rank in range(size)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert all(c.exitcode is not None for c in children), "a process hangs"
    return [c.exitcode or 0 for c in children], [json.loads(p.read_text()) if p.exists() else {} for p in said]


def _train(spec: str, folder: str, settings: Sequence[str] = (), at: int = 0, number: int = 0) -> None:
    """Trains; sends itself a signal after step `at`."""
    whole = loop.steps

    def steps(*words: Any, **named: Any) -> Any:
        for result in whole(*words, **named):
            if result.step == at:
                os.kill(os.getpid(), number)
            yield result

    loop.steps = steps  # type: ignore[assignment]
    metier.train(spec, runs=folder, settings=settings)


@dataclass(frozen=True)
class Case:
    spec: Path
    folder: Path

    def build(self, name: str, *settings: str) -> str:
        metier.build(self.spec, runs=self.folder / name, settings=settings)
        return str(self.folder / name)

    def alone(self, name: str, *settings: str) -> Path:
        self.build(name)
        metier.train(self.spec, runs=self.folder / name, settings=settings)
        return self.folder / name

    def two(self, name: str, *settings: str) -> Path:
        words = (str(self.spec), self.build(name), settings)
        assert _together(self.folder, _train, words, words)[0] == [0, 0]
        return self.folder / name


@pytest.fixture(scope="module")
def case(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("world")
    return Case(write_specialist(folder / "colours", tiny, rows=48), folder)


@pytest.fixture(scope="module")
def one(case: Case) -> Path:
    return case.alone("one")


@pytest.fixture(scope="module")
def two(case: Case) -> Path:
    return case.two("two")


def curve(folder: Path) -> list[float]:
    """Losses of steps and validations."""
    lines = (folder / "colours/train/metrics.jsonl").read_text().splitlines()
    return [m.get("loss", m.get("valid_loss")) for m in map(json.loads, lines)]


def hold_equal(found: Path, expected: Path) -> None:
    assert len(curve(found)) > 6
    assert curve(found) == pytest.approx(curve(expected), rel=1e-6)
    ours, theirs = load_file(found / ADAPTER), load_file(expected / ADAPTER)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-5)


# Equalities


def test_two_processes_equal_one(one: Path, two: Path) -> None:
    hold_equal(two, one)
    made = json.loads((two / "colours/train/plan.json").read_text())
    assert (made["world_size"], made["sharded"]) == (2, False)


def test_a_sharded_base_changes_nothing(case: Case, two: Path) -> None:
    sharded = case.two("sharded", "machine.shard=always")
    assert json.loads((sharded / "colours/train/plan.json").read_text())["sharded"] is True
    assert (sharded / ADAPTER).read_bytes() == (two / ADAPTER).read_bytes() and curve(sharded) == curve(two)


def test_a_sharded_base_is_measured_before_it_trains(case: Case) -> None:
    """The first pass over raw text keeps no gradient; the layers it gathers must serve the steps behind it."""
    notes = case.spec / "notes"
    notes.mkdir()
    for number in range(40):
        (notes / f"{number}.txt").write_text(
            f"Note {number}. " + f"colour {number * 7919} is not {number * 104729}. " * 6
        )
    settings = ("data.text=[notes/*.txt]", "train.method=cpt", "train.max_length=64", "machine.shard=always")
    called = (str(case.spec), case.build("text", *settings), settings)
    assert _together(case.folder, _train, called, called)[0] == [0, 0]
    before_and_after = json.loads((case.folder / "text/colours/train/plan.json").read_text())["bits_per_byte"]["cpt"]
    assert before_and_after["after"] < before_and_after["before"]


@pytest.mark.parametrize("shard", ["never", "always"])
def test_a_process_without_a_row_changes_nothing(case: Case, shard: str) -> None:
    single = ("train.batch_size=1", "train.epochs=0.3")
    expected = case.folder / "single" if (case.folder / "single").is_dir() else case.alone("single", *single)
    hold_equal(case.two(f"single-{shard}", *single, f"machine.shard={shard}"), expected)


def test_nothing_but_the_first_process_writes(two: Path) -> None:
    steps = [json.loads(line)["step"] for line in (two / "colours/train/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and len(set(steps)) == 12
    assert not list(two.rglob(".work-*"))


# Ends


def test_a_killed_process_ends_the_other_and_the_run_goes_on(case: Case, two: Path) -> None:
    words = (str(case.spec), case.build("killed"))
    codes, said = _together(case.folder, _train, words, (*words, (), 5, signal.SIGKILL))
    assert codes == [1, -signal.SIGKILL]
    assert "another process of this world has ended" in said[0]["what"] and "checkpoint" in said[0]["fix"]
    assert (Path(words[1]) / "colours" / ".work-train" / "checkpoints" / "step-00000003").is_dir()
    assert _together(case.folder, _train, words, words)[0] == [0, 0]
    assert (Path(words[1]) / ADAPTER).read_bytes() == (two / ADAPTER).read_bytes()


def test_a_signal_to_one_process_stops_both_at_one_step(case: Case, one: Path) -> None:
    words = (str(case.spec), case.build("stopped"))
    assert _together(case.folder, _train, words, (*words, (), 2, signal.SIGTERM))[0] == [143, 143]
    checkpoints = Path(words[1]) / "colours" / ".work-train" / "checkpoints"
    assert [p.name for p in checkpoints.iterdir()] == ["step-00000002"]
    metier.train(case.spec, runs=words[1])  # by one process now
    assert json.loads((Path(words[1]) / "colours/train/plan.json").read_text())["world_size"] == 1
    hold_equal(Path(words[1]), one)


@pytest.mark.parametrize("differ", ["settings", "data set"])
def test_processes_that_differ_are_refused(case: Case, differ: str) -> None:
    first = (str(case.spec), case.build(f"first {differ}"), ("train.rank=2",))
    other = case.build("other data", "data.sizes.train=8") if differ == "data set" else first[1]
    second = (str(case.spec), other, ("train.rank=2",) if differ == "data set" else ("train.rank=3",))
    codes, said = _together(case.folder, _train, first, second)
    assert codes == [2, 2]
    assert all(differ in s["what"] and "rank 1" in s["what"] for s in said)
    assert not (Path(first[1]) / "colours/train").exists()


def test_the_others_are_let_go_where_nothing_is_due(case: Case, two: Path) -> None:
    words = (str(case.spec), str(two))
    before = (two / "colours/train/act.json").stat().st_mtime_ns
    assert _together(case.folder, _train, words, words)[0] == [0, 0]
    assert (two / "colours/train/act.json").stat().st_mtime_ns == before


# The parts


def _parts(rank: int) -> None:
    with world.joined(torch.device("cpu"), 60) as here:
        assert (here.rank, here.size, here.writes) == (rank, 3, rank == 0)
        # 1e16 + 1 − 1e16 is 0 in float64 by the order of ranks, and 1 in any order that adds the large ones first
        assert here.total((1e16, 1.0, -1e16)[rank], rank) == (0.0, 3.0)
        assert here.most((3, 15, 2)[rank]) == 15
        assert here.told(lambda: {"rank": rank, "text": "né"}) == {"rank": 0, "text": "né"}
        sum_N = torch.tensor([(1e8, 1.0, -1e8)[rank], 0.5, float(rank), 1.0])
        here.add(sum_N)
        assert sum_N.tolist() == [0.0, 1.5, 3.0, 3.0]
        assert here.copy(None) is None
        made = {"a": torch.arange(3.0), "b": torch.tensor([[7]])} if here.writes else None
        copied = here.copy(made)
        assert copied is not None and copied["a"].tolist() == [0.0, 1.0, 2.0] and copied["b"].tolist() == [[7]]


def test_sums_are_made_in_the_order_of_ranks(tmp_path: Path) -> None:
    assert _together(tmp_path, _parts, (0,), (1,), (2,))[0] == [0, 0, 0]


def test_one_process_is_a_world_that_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **_: pytest.fail("joined"))
    with world.joined(torch.device("cpu"), 1) as here:
        assert here is world.ALONE and here.total(2, 0.5) == (2, 0.5) and here.most(7) == 7
        assert here.told(lambda: [1]) == [1]
    assert not world.launched() and not world.follows() and world.beside() == 1


def test_a_world_that_is_half_described_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="MASTER_ADDR"), world.joined(torch.device("cpu"), 1):
        pass


def test_a_base_that_is_trained_whole_cannot_be_spread(tiny: Path) -> None:
    model = load.model(load.resolve(str(tiny), tiny), dtype=torch.float32, device=torch.device("cpu"))
    model.requires_grad_(True)
    with pytest.raises(ConfigError, match="only frozen weights"):
        world.shard(world.World(0, 2), model, torch.device("cpu"))


def made_rows(count: int) -> list[Row]:
    random = np.random.default_rng(1)
    sizes = random.integers(5, 60, count)
    return [Row(f"r{n}", random.integers(6, 384, size), np.arange(size) >= size - 2) for n, size in enumerate(sizes)]


@pytest.mark.parametrize("count", [0, 1, 2, 5, 64])
def test_rows_are_dealt_once_and_evenly(count: int) -> None:
    data = made_rows(count)
    shares = batches.deal(data, 3)
    assert sorted(r.id for share in shares for r in share) == sorted(r.id for r in data)
    tokens = [sum(r.ids.size for r in share) for share in shares]
    assert max(tokens) - min(tokens) <= max((r.ids.size for r in data), default=0)
    assert batches.deal(data[::-1], 3) == shares, "the order in which rows come does not matter"


def test_a_silent_batch_teaches_nothing(tiny: Path) -> None:
    model = load.model(load.resolve(str(tiny), tiny), dtype=torch.float32, device=torch.device("cpu"))
    lora.attach(model, rank=4, alpha=8, targets="all-linear", seed=0)
    flat = loop.Flat(lora.parameters(model))
    flat.value_N.fill_(0.01)
    logprob_K = loop.logprobs(model, batches.silent(made_rows(1)[0], 3))
    (-logprob_K.sum()).backward()
    assert logprob_K.numel() == 0 and not flat.grad_N.any()


# The plan


def spread_plan(**changes: Any) -> dict[str, Any]:
    # An 8B Llama with rank 16 on all linear layers.
    sizes = Shape(
        layers=32,
        hidden=4096,
        intermediate=14336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocabulary=128256,
        linear_weights=6_979_321_856,
        all_weights=8_030_261_248,
        adapter_weights=41_943_040,
    )
    data = Load(computed_tokens=10**6, real_tokens=10**6, supervised_tokens=10**5, longest=512, epochs=1, steps=10)
    device = changes.pop("device", "cpu")
    made = plan(sizes, data, dtype="bf16", gflops=300, memory_gb=256, device=device, tokens=1024)
    among = {"steps": 10, "size": 4, "beside": 2, "shard": "auto", "memory_gb": 256.0} | changes
    return spread(made, shape=sizes, **among)


def test_the_base_is_spread_where_a_copy_does_not_fit() -> None:
    assert spread_plan(device="cuda", memory_gb=80.0)["sharded"] is False  # about 20 GB
    small = spread_plan(device="cuda", memory_gb=16.0)
    assert small["sharded"] is True and "spread over 4 processes" in small["why"][-1]
    assert small["memory_gb"]["predicted"] < spread_plan()["memory_gb"]["predicted"] - 9
    assert spread_plan(device="cuda", memory_gb=16.0, shard="never")["sharded"] is False
    assert spread_plan(memory_gb=16.0)["sharded"] is False, "on CPUs only where it is asked for"
    assert spread_plan(shard="always")["sharded"] is True
    assert spread_plan(shard="always", size=1, beside=1)["sharded"] is False


def test_machines_add_speed_and_processes_on_one_cpu_do_not() -> None:
    alone = spread_plan(size=1, beside=1)["seconds"]["predicted"]
    assert spread_plan(size=2, beside=2, steps=0)["seconds"]["predicted"] == alone
    assert spread_plan(size=4, beside=2, steps=0)["seconds"]["predicted"] == pytest.approx(alone / 2, rel=0.01)
    # 41.9 million numbers of 4 bytes, 3/4 of them sent twice over 1 GB/s: a quarter of a second a step
    sums = spread_plan(size=4, beside=2, steps=1000)["seconds"]["predicted"] - alone / 2
    assert sums == pytest.approx(1000 * 0.2517, rel=0.01)
    assert "why" in spread_plan() and spread_plan(size=1, beside=1)["world_size"] == 1


# Launchers


@pytest.mark.slow
def test_torchrun_joins_by_itself(case: Case, two: Path) -> None:
    folder = case.build("torchrun")
    command = ["-m", "metier", "train", str(case.spec), "--runs", folder, "--json"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    done = subprocess.run(
        [sys.executable, *launch, "--rdzv-endpoint", f"127.0.0.1:{_port()}", *command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(metier.__file__).parents[1]), "GLOO_SOCKET_IFNAME": "lo"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "done"
    assert (Path(folder) / ADAPTER).read_bytes() == (two / ADAPTER).read_bytes()


@pytest.mark.slow
def test_two_ray_workers_equal_two_processes(case: Case, two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason='ray is not installed: pip install "metier[scale]"')
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(metier.__file__).parents[1]))
    folder = case.build("ray")
    done = metier.train(case.spec, runs=folder, settings=["machine.on=ray", "machine.workers=2"])
    assert done.status == "done" and done.figures["steps"] == 12
    assert (Path(folder) / ADAPTER).read_bytes() == (two / ADAPTER).read_bytes()
    assert metier.train(case.spec, runs=folder).status == "up to date", "who starts the processes changes nothing"


def test_ray_that_is_not_installed_is_named(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else there(name))
    folder = case.build("no ray")
    with pytest.raises(ResourceError, match="ray is not installed") as caught:
        metier.train(case.spec, runs=folder, settings=["machine.on=ray"])
    assert 'pip install "metier[scale]"' in caught.value.fix


def test_workers_without_ray_are_refused(case: Case) -> None:
    with pytest.raises(ConfigError, match="workers are started with `on: ray`"):
        metier.train(case.spec, settings=["machine.workers=2"], dry=True)


def test_ray_workers_get_what_torchrun_would_set() -> None:
    places = [("a", "10.0.0.1", 5000, 1), ("b", "10.0.0.2", 6000, 2), ("a", "10.0.0.1", 7000, 3)]
    found = workers._environments(places)
    assert [e["RANK"] for e in found] == ["0", "1", "2"] and {e["WORLD_SIZE"] for e in found} == {"3"}
    assert [(e["LOCAL_RANK"], e["LOCAL_WORLD_SIZE"]) for e in found] == [("0", "2"), ("0", "1"), ("1", "2")]
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"]) for e in found} == {("10.0.0.1", "5000")}


def test_an_error_crosses_as_plain_text() -> None:
    error = NumericError("the loss is not finite", where="row 3", fix="lower the rate")
    again = recorded(error.record())
    assert type(again) is NumericError and str(again) == str(error) and again.exit_code == error.exit_code
    assert runs.digest(again.record()) == runs.digest(error.record())
