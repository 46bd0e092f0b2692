"""The dashboard, the alerts and the documentation know the metrics that there are, and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.support.fake_backend import FakeBackend, fake_manifest
from tests.support.promql import parsed
from tests.support.telemetry import metrics_of, record_of
from tests.unit.test_service import service

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "medusa.json"
ALERTS, PROMETHEUS = ROOT / "deploy" / "alerts.yaml", ROOT / "deploy" / "prometheus.yaml"
METRICS = ROOT / "docs" / "metrics.md"
ADDED = {"instance", "job"}  # labels that Prometheus adds
COMMON = {"model_name", "engine"}
Series = list[tuple[str, dict[str, str]]]


@pytest.fixture(scope="module")
def families() -> list[Metric]:
    """What a server exposes after requests of all kinds."""
    with service(backend=FakeBackend("sometimes", fake_manifest(max_seq_len=300)), prompt_lookup=True) as lm:
        metrics = metrics_of(lm)
        metrics.observe(record_of(lm.generate("abcabcabc", max_new_tokens=40).stats))
        for status in (404, 429, 500):
            metrics.observe(record_of(status=status))
        return list(text_string_to_metric_families(metrics.exposition()[0].decode()))


@pytest.fixture(scope="module")
def series(families: list[Metric]) -> Series:
    found = [(sample.name, dict(sample.labels)) for family in families for sample in family.samples]
    return [*found, ("up", {"job": yaml.safe_load(PROMETHEUS.read_text("utf-8"))["scrape_configs"][0]["job_name"]})]


def check(expression: str, series: Series) -> set[str]:
    """Every selector finds something, and labels exist. Returns the labels that the result is grouped or joined by."""
    query = parsed(expression)
    assert query.selectors, expression
    known: set[str] = set(ADDED)
    for selector in query.selectors:
        labels = {label for name, has in series if name == selector.name for label in has}
        assert any(selector.matches(*one) for one in series), f"no series for {selector} in {expression}"
        assert {label for label, _, _ in selector.matchers} <= labels | ADDED, expression
        known |= labels
    assert query.groups <= known, expression
    return query.groups


def dashboard() -> dict:
    return json.loads(DASHBOARD.read_text("utf-8"))


def panels() -> list[dict]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_each_panel_asks_for_what_there_is(panel: dict, series: Series) -> None:
    assert panel["description"].endswith(".")
    for target in panel["targets"]:
        groups = check(target["expr"], series)
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= groups


def test_the_variables_ask_for_what_there_is(series: Series) -> None:
    variables = {one["name"]: one for one in dashboard()["templating"]["list"]}
    assert set(variables) == {"datasource", "model", "instance"}
    for name in ("model", "instance"):
        metric, label = re.fullmatch(r"label_values\((\S+), (\w+)\)", variables[name]["query"]["query"]).groups()
        has = next(labels for found, labels in series if found == metric)
        assert label in has or label in ADDED


def test_the_dashboard_is_laid_out_for_grafana() -> None:
    board, taken = dashboard(), set()
    assert (board["schemaVersion"] >= 39, board["uid"], board["id"]) == (True, "medusa-serve", None)
    assert [panel["title"] for panel in board["panels"] if panel["type"] == "row"] == [
        "Traffic", "Latency", "Medusa", "Engine", "Errors",
    ]  # fmt: skip
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, f"{panel['title']} is above another panel"
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def rules() -> list[dict]:
    return [rule for group in yaml.safe_load(ALERTS.read_text("utf-8"))["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_each_alert_asks_for_what_there_is(rule: dict, series: Series) -> None:
    check(rule["expr"], series)
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    known = {label for _, labels in series for label in labels} | ADDED
    for text in rule["annotations"].values():
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= known


def test_prometheus_scrapes_the_server_and_loads_the_alerts() -> None:
    config = yaml.safe_load(PROMETHEUS.read_text("utf-8"))
    [job] = config["scrape_configs"]
    assert (job["metrics_path"], job["static_configs"]) == ("/metrics", [{"targets": ["localhost:8000"]}])
    assert [(PROMETHEUS.parent / name).resolve() for name in config["rule_files"]] == [ALERTS.resolve()]


def rows(text: str, head: str) -> Iterator[list[str]]:
    """The cells of all tables that begin with a head."""
    for table in text.split(head + "\n")[1:]:
        for line in table.splitlines()[1:]:
            if not line.startswith("|"):
                break
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_the_documentation_has_every_metric_and_no_other(families: list[Metric]) -> None:
    told = {
        name.strip("`"): (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels, _ in rows(METRICS.read_text("utf-8"), "| metric | type | labels | meaning |")
    }
    exposed = {}
    for family in families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        exposed[name] = (family.type, {label for sample in family.samples for label in sample.labels} - COMMON - {"le"})
    assert told == exposed


def test_the_documentation_has_every_alert() -> None:
    told = [name.strip("`") for name, _ in rows(METRICS.read_text("utf-8"), "| alert | means |")]
    assert told == [rule["alert"] for rule in rules()]


def test_the_documentations_expressions_are_right(series: Series) -> None:
    [expression] = re.findall(r"acceptance by depth: `(.*)`", METRICS.read_text("utf-8"))
    assert check(expression, series) == {"depth"}


def test_the_documentations_line_of_the_log_has_the_logs_fields() -> None:
    from medusa_runtime import DecodingStats
    from medusa_serve.telemetry.access_log import as_line

    [line] = re.findall(r"```json\n(.*)\n```", METRICS.read_text("utf-8"))
    assert list(json.loads(line)) == list(json.loads(as_line(record_of(DecodingStats()))))
