"""Alert rules and dashboards: Prometheus' tools accept them, and a Prometheus with a server returns data."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.docker.tools import DOCKER, ROOT, run, tool
from tests.prompt_store.databases import postgres_url
from tests.support.ingress import ingress_without_ray
from tests.support.processes import free_port, server_process
from tests.support.serving import BASE, adapter, serving, upload
from tests.support.waiting import seconds_until

RULES = DOCKER / "prometheus" / "rules.yml"
DASHBOARDS = sorted((DOCKER / "grafana" / "dashboards").glob("*.json"))
CLUSTER = "cluster"
"""The dashboard of an ingress; the others are those of servers."""

TASKS = ("sentiment", "extract", "intent")
_SECONDS = 30.0


def dashboard(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_configuration_is_valid() -> None:
    run("promtool", "check", "config", "--syntax-only", DOCKER / "prometheus" / "prometheus.yml")


def test_rules_are_valid() -> None:
    run("promtool", "check", "rules", "--lint-fatal", RULES)


def test_rules_fire_when_they_should() -> None:
    run("promtool", "test", "rules", DOCKER / "prometheus" / "rules_test.yml")


def test_every_alert_has_a_unit_test_with_and_without_firing() -> None:
    cases = yaml.safe_load((DOCKER / "prometheus" / "rules_test.yml").read_text())["tests"]
    checks = [check for case in cases for check in case["alert_rule_test"]]
    alerts = {rule["alert"] for rule in rules()}
    assert {check["alertname"] for check in checks if check.get("exp_alerts")} == alerts
    assert {check["alertname"] for check in checks if not check.get("exp_alerts")} == alerts


def test_every_alert_says_what_to_do() -> None:
    documented = re.findall(r"^\| `(Prelude\w+)` \|", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert documented == [rule["alert"] for rule in rules()]
    for rule in rules():
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"].keys() == {"summary", "description"}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_match_the_provisioned_data_source(path: Path) -> None:
    provisioning = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    board = dashboard(path)
    assert board["uid"] == f"prelude-{path.stem}"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in board["panels"]:
        assert panel["description"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": source["uid"]}
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
    for one, other in itertools.combinations([panel["gridPos"] for panel in board["panels"]], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, "two panels overlap"


@dataclass
class Prometheus:
    """A Prometheus with the project's rules, and a load that produces data."""

    client: httpx.Client
    keep_busy: Callable[[], None]

    def ask(self, path: str, **parameters: str) -> Any:
        reply = self.client.get(f"/api/v1/{path}", params=parameters).json()
        assert reply["status"] == "success", f"{parameters}: {reply['error']}"
        return reply["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return result


@contextmanager
def prometheus(folder: Path, target: str, keep_busy: Callable[[], None]) -> Iterator[Prometheus]:
    """Prometheus with the project's configuration, except for the targets and the scrape interval."""
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    (scrape,) = config["scrape_configs"]
    config["scrape_configs"] = [{"job_name": scrape["job_name"], "static_configs": [{"targets": [target]}]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}", "--log.level=warn"]
    log = folder / "prometheus.log"
    with (
        server_process(command, f"http://{address}/-/ready", log=log, seconds=_SECONDS, stdout=subprocess.DEVNULL),
        httpx.Client(base_url=f"http://{address}", timeout=20) as client,
    ):
        yield Prometheus(client, keep_busy)


def make_busy(client: httpx.Client) -> None:
    """Requests that answer, fail, and are given up."""
    for model in (BASE, *TASKS):
        body = {"model": model, "prompt": ["My lamp feels flimsy", "Will it rain in Oslo?"], "max_tokens": 4}
        assert client.post("/v1/completions", json=body).status_code == 200
    body = {"model": TASKS[0], "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())  # and disconnects
    assert client.post("/v1/completions", json={"model": "missing", "prompt": "x"}).status_code == 404
    assert client.post("/v1/completions", json={"model": BASE, "max_tokens": -1}).status_code == 400


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    tool("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    with serving(folder / "server", "--num-threads", "1") as (client, _):
        for task in TASKS:
            assert upload(client, task, *adapter(task)).status_code == 201

        def keep_busy() -> None:
            make_busy(client)

        keep_busy()
        with prometheus(folder, client.base_url.netloc.decode(), keep_busy) as watching:
            yield watching


@pytest.fixture(scope="module")
def watched_ingress(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that scrapes the ingress of two replicas."""
    tool("prometheus")
    folder = tmp_path_factory.mktemp("ingress")
    with (
        postgres_url() as catalog,
        ingress_without_ray(folder / "cluster", catalog) as url,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        for task in TASKS:
            assert upload(client, task, *adapter(task)).status_code == 201

        def keep_busy() -> None:
            with ThreadPoolExecutor(4) as pool:
                for done in [pool.submit(make_busy, client) for _ in range(4)]:
                    done.result()

        keep_busy()
        with prometheus(folder, client.base_url.netloc.decode(), keep_busy) as watching:
            yield watching


@pytest.fixture
def watcher_of(request: pytest.FixtureRequest) -> Callable[[Path], Prometheus]:
    """The Prometheus that has the data of a dashboard."""

    def find(path: Path) -> Prometheus:
        name = "watched_ingress" if path.stem == CLUSTER else "watched"
        found: Prometheus = request.getfixturevalue(name)
        return found

    return find


def without_variables(expression: str) -> str:
    """A panel's query as Grafana sends it when all servers are selected."""
    for variable, value in (("$instance", ".*"), ("$replica", ".+"), ("$__rate_interval", "10s")):
        expression = expression.replace(variable, value)
    assert "$" not in expression
    return expression


def unanswered(watched: Prometheus, expressions: dict[str, str]) -> list[str]:
    """Names of the expressions without data after a while under load."""

    def left() -> list[str]:
        watched.keep_busy()
        return [name for name, expression in expressions.items() if not watched.query(expression)]

    seconds_until(lambda: not left(), _SECONDS, pause=0.5)
    return left()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_shows_data(watcher_of: Callable[[Path], Prometheus], path: Path) -> None:
    expressions = {
        f"{panel['title']} {target['refId']}": without_variables(target["expr"])
        for panel in dashboard(path)["panels"]
        for target in panel["targets"]
    }
    assert unanswered(watcher_of(path), expressions) == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_the_variable_finds_servers_or_replicas(watcher_of: Callable[[Path], Prometheus], path: Path) -> None:
    watched = watcher_of(path)
    (variable,) = dashboard(path)["templating"]["list"]
    found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
    assert found is not None
    assert unanswered(watched, {"metric": found[1]}) == []
    assert found[2] == variable["name"]
    assert {sample["metric"][found[2]] for sample in watched.query(found[1])} != {""}


def test_the_cluster_dashboard_tells_the_replicas_apart(watched_ingress: Prometheus) -> None:
    """By replica there is a line for each; a second ingress that reports the same replicas changes no value."""
    panels = {
        panel["title"]: panel for panel in dashboard(DOCKER / "grafana" / "dashboards" / f"{CLUSTER}.json")["panels"]
    }
    replicas = {f"{BASE}-0", f"{BASE}-1"}
    for title, panel in panels.items():
        if "by replica" not in title:
            continue
        expression = without_variables(panel["targets"][0]["expr"])
        first = expression.removeprefix("histogram_quantile(0.95, ").partition("(")[2].partition(")")[0]
        assert first in ("replica", "le, replica"), title
        if title != "Error replies by replica":
            assert {sample["metric"]["replica"] for sample in watched_ingress.query(expression)} == replicas, title
    ratio = without_variables(panels["Balance"]["targets"][0]["expr"])
    values = [float(sample["value"][1]) for sample in watched_ingress.query(ratio)]
    assert len(values) == 1
    assert values[0] != values[0] or 1 <= values[0] <= len(replicas)  # NaN: idle
    warm = without_variables(panels["Warm"]["targets"][0]["expr"])

    def share() -> float:
        watched_ingress.keep_busy()
        return sum(float(sample["value"][1]) for sample in watched_ingress.query(warm))

    seconds_until(lambda: share() > 0.5, _SECONDS, pause=0.5)
    assert 0.5 < share() <= 1


def test_every_rule_is_evaluated(watched: Prometheus) -> None:
    def ask() -> list[dict[str, Any]]:
        return [rule for group in watched.ask("rules")["groups"] for rule in group["rules"]]

    seconds_until(lambda: all(rule["health"] != "unknown" for rule in ask()), _SECONDS, pause=0.2)
    found = ask()
    assert [rule["name"] for rule in found] == [rule["alert"] for rule in rules()]
    assert {rule["health"]: rule.get("lastError") for rule in found} == {"ok": None}
    assert [rule["name"] for rule in found if rule["state"] == "firing"] == []


def test_every_metric_of_the_rules_exists(watched: Prometheus) -> None:
    names = {name for rule in rules() for name in re.findall(r"\bprelude_\w+", rule["expr"])}
    assert names
    assert unanswered(watched, {name: name for name in names}) == []


def test_rules_name_existing_error_codes() -> None:
    from server.api.errors import _BEFORE_PARSING, _TABLE, describe_status

    codes = {row.code for row in _TABLE.values()} | {describe_status(status).code for status in _BEFORE_PARSING}
    for rule in rules():
        for pattern in re.findall(r'code=~"([^"]+)"', rule["expr"]):
            assert set(pattern.split("|")) <= codes
