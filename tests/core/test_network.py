"""The time model by hand, and on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures.tiny import experiment, tiny_world

import fedlora
from fedlora.config.federated_data import prepare
from fedlora.core.errors import ConfigError
from fedlora.core.network import Network, Turn, parse_network, seconds_to, slowest_seconds
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.cost import costs
from fedlora.show.compare import comparison, load_result
from fedlora.show.report import cost_table

world = pytest.fixture(scope="module")(tiny_world)

ROW = RoundRecord(
    round=1, phase=0, cohort=(0, 1), examples=4, steps=2, loss=1.0,
    down_bytes={"adapter": 2000}, up_bytes={"head": 400}, density_down=1.0,
    density_up=1.0, update_norm=1.0, references={"zero": 2}, slowest_seconds=3.0,
)  # fmt: skip
NET = Network(down=8000.0, up=800.0, latency=0.5)


def test_a_turn_is_latency_twice_both_transfers_and_work() -> None:
    assert NET.seconds(1000, 200, 3.0) == 1.0 + 1.0 + 3.0 + 2.0
    assert NET.round_seconds(ROW) == 7.0  # per client half of the round's bytes
    assert NET.round_seconds(replace(ROW, references={})) == 3.0  # nothing was sent
    assert NET.round_seconds(replace(ROW, cohort=())) == 7.0  # secret


def test_the_slowest_tier_decides() -> None:
    tiers = {
        "phone": {"down_bytes": {"adapter": 500}, "up_bytes": {"head": 100}, "clients": {"num": 1}},
        "desk": {"down_bytes": {"adapter": 1500}, "up_bytes": {"head": 300}, "clients": {"num": 1}},
    }
    assert NET.round_seconds(replace(ROW, tiers=tiers)) == NET.seconds(1500, 300, 3.0)
    # each with its own work
    own = replace(ROW, tiers=tiers, tier_seconds={"phone": 30.0, "desk": 3.0}, slowest_seconds=30.0)
    assert NET.round_seconds(own) == NET.seconds(500, 100, 30.0)


def test_time_passes_until_the_target_is_reached() -> None:
    start = replace(ROW, round=0, cohort=(), references={}, slowest_seconds=0.0, metrics={"accuracy": 0.1})
    rows = [start, ROW, replace(ROW, round=2, metrics={"accuracy": 0.5}), ROW]
    assert seconds_to(rows, NET, "accuracy", 0.5, True) == 14.0
    assert seconds_to(rows, NET, "accuracy", 0.6, True) is None
    assert seconds_to(rows, NET, "accuracy", 0.2, False) == 0.0
    with pytest.raises(ConfigError, match=r"no clients\.network"):
        seconds_to(rows, None, "accuracy", 0.5, True)
    known = [replace(row, network_seconds=2.0) if row.round else row for row in rows]
    assert seconds_to(known, None, "accuracy", 0.5, True) == 4.0


def test_a_round_is_as_long_as_its_slowest_client_over_its_own_network() -> None:
    networks = {"": NET, "phone": Network(down=800.0, up=80.0, latency=1.0), "desk": NET}
    turns = [Turn("desk", 1000, 200, 9.0), Turn("phone", 100, 20, 1.0), Turn("desk", 9000, 0, 0.0)]
    assert slowest_seconds(networks, turns) == pytest.approx(max(1 + 1 + 9 + 2, 2 + 1 + 1 + 2, 1 + 9 + 0 + 0))
    assert slowest_seconds({}, turns) is None
    assert slowest_seconds(networks, []) == 0.0


TIERS = (
    "clients.tiers=[{name='weak', share=0.5, max_steps=1, network='down=1Mbit,up=1kbit'}, {name='strong', share=0.5}]"
)


def test_the_ledger_tells_what_rounds_take_over_the_networks_of_tiers(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "lora", "clients.network='down=10Mbit,up=1Mbit'", TIERS, rounds=2)
    result = fedlora.run(chosen, tmp_path / "run")
    for row in result.rows[1:]:
        sent = row.tiers["weak"]
        num = sent["clients"]["num"]
        down, up = (sum(sent[way].values()) / num for way in ("down_bytes", "up_bytes"))
        slow = Network(1e6, 1e3).seconds(down, up, 0.0)
        assert row.network_seconds is not None
        # messages of one tier differ a little in length
        assert slow <= row.network_seconds <= 1.05 * slow + row.tier_seconds["weak"]
    (found,) = comparison([load_result(result.folder)], (None, 0.0))
    assert found["seconds_to_target"] == 0.0
    (found,) = comparison([load_result(result.folder)], (None, 1.01))
    assert found["seconds_to_target"] is None


def test_where_nothing_is_sent_a_round_is_as_long_as_its_work(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "lora", "mode='centralised'", "clients.network='down=1Mbit,up=1kbit'", rounds=1)
    row = fedlora.run(chosen, tmp_path / "run").rows[1]
    assert row.network_seconds == row.slowest_seconds == NET.round_seconds(row) > 0


def test_a_cost_is_that_of_the_slowest_tier(world: Path) -> None:
    chosen = experiment(
        world, "lora", TIERS, "clients.network='down=10Mbit,up=1Mbit'", "method.local.batch_size=2", rounds=2
    )
    (phase,) = costs(chosen, prepare(chosen))
    weak, strong = phase.tiers["weak"], phase.tiers["strong"]
    assert weak.steps == 1 < strong.steps
    networks = chosen.clients.networks()
    slow, fast = Network(1e6, 1e3), Network(1e7, 1e6)
    for step in (0.0, 1.0, 1000.0):
        each = (
            slow.seconds(weak.down_bytes, weak.up_bytes, step),
            fast.seconds(strong.down_bytes, strong.up_bytes, strong.steps * step),
        )
        assert phase.round_seconds(networks, step) == max(each)
        values, table = cost_table([phase], networks, step)
        told = values["phases"][0]["tiers"]
        assert [told[name]["round_seconds"] for name in ("weak", "strong")] == list(each)
        assert [str(cell).strip() for cell in table.columns[0].cells] == ["0 lora", "tier weak", "tier strong"]
    down = sum(phase.down_bytes.values())
    assert down == pytest.approx((weak.down_bytes + strong.down_bytes) / 2, abs=2)


def test_a_tier_with_a_network_needs_one_of_the_others(world: Path) -> None:
    with pytest.raises(ConfigError, match=r"set clients\.network too"):
        experiment(world, "lora", TIERS)
    with pytest.raises(ConfigError, match="is not understood"):
        experiment(world, "lora", "clients.network='fast'")


def test_networks_are_read_from_words() -> None:
    assert parse_network("down=10Mbit,up=1Mbit,latency=50ms") == Network(10e6, 1e6, 0.05)
    assert parse_network(" up=56kbit, down=1.5Gbit ") == Network(1.5e9, 56e3, 0.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "down=10",
        "down=10Mbit",
        "down=0Mbit,up=1Mbit",
        "down=1s,up=1bit",
        "x=1bit",
        "down=.Mbit,up=1bit",
        "down=" + "9" * 400 + "bit,up=1bit",
        "down=1bit,down=2bit,up=1bit",
    ],
)
def test_other_words_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="down=10Mbit,up=1Mbit,latency=50ms"):
        parse_network(text)


def test_runs_are_compared_by_the_time_to_a_target(world: Path, tmp_path: Path) -> None:
    result = fedlora.run(experiment(world, "lora", rounds=2), tmp_path / "run")
    assert all(row.slowest_seconds > 0 for row in result.rows[1:])
    reached = max(row.metrics["accuracy"] for row in result.rows if row.metrics)
    (row,) = comparison([load_result(result.folder)], (NET, reached))
    total = sum(NET.round_seconds(row) for row in result.rows)
    assert 0 <= row["seconds_to_target"] <= total
    (row,) = comparison([load_result(result.folder)], (NET, 1.01))
    assert row["seconds_to_target"] is None


def test_the_command_line_tells_times(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from fedlora import config
    from fedlora.cli import main as cli

    path = tmp_path / "run.toml"
    path.write_text(config.to_toml(experiment(world, "lora", rounds=2)))

    def said(*words: str) -> dict:
        monkeypatch.setattr("sys.argv", ["fedlora", *words, "--format", "json"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        return json.loads(capsys.readouterr().out)

    network = "down=10Mbit,up=1Mbit,latency=50ms"
    plain = said("cost", str(path))
    timed = said("cost", str(path), "--link", network, "--step-seconds", "2")
    assert "seconds" not in plain
    (phase,) = timed["phases"]
    sent = (sum(phase["client_down_bytes"].values()), sum(phase["client_up_bytes"].values()))
    assert phase["round_seconds"] > parse_network(network).seconds(*sent, 2.0) - 1e-9
    assert timed["seconds"] == pytest.approx(2 * phase["round_seconds"])
    fedlora.run(config.load(path), tmp_path / "run")
    (row,) = said("compare", str(tmp_path / "run"), "--link", network, "--target", "0.0")
    assert row["seconds_to_target"] == 0.0
    path.write_text(config.to_toml(experiment(world, "lora", f"clients.network={network!r}", rounds=2)))
    assert said("cost", str(path), "--step-seconds", "2")["seconds"] == timed["seconds"]
    path.write_text(config.to_toml(experiment(world, "lora", rounds=2)))
    for wrong in (["compare", str(tmp_path / "run"), "--link", network], ["cost", str(path), "--step-seconds", "2"]):
        monkeypatch.setattr("sys.argv", ["fedlora", *wrong])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
