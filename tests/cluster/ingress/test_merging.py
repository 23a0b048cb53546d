"""Answers of several replicas as one."""

from __future__ import annotations

import json

from prometheus_client.parser import text_string_to_metric_families

from server.cluster.ingress.merging import merged_metrics, merged_models

TEXT = """# HELP prelude_x_total What, x.
# TYPE prelude_x_total counter
prelude_x_total 1.0
prelude_x_total{a="b {c}"} 2.0
# HELP prelude_h Sizes.
# TYPE prelude_h histogram
prelude_h_bucket{le="1.0"} 1.0
prelude_h_bucket{le="+Inf"} 2.0
prelude_h_count 2.0
prelude_h_sum 3.0
"""


def test_every_sample_has_the_label_and_families_stand_together() -> None:
    text = merged_metrics({"a": TEXT, "b": TEXT, "c": ""})
    families = list(text_string_to_metric_families(text))
    assert [family.name for family in families] == ["prelude_x", "prelude_h"]
    samples = [sample for family in families for sample in family.samples]
    assert len(samples) == 12
    assert {sample.labels["replica"] for sample in samples} == {"a", "b"}
    assert text.count("# TYPE prelude_x_total") == 1
    assert [sample.value for sample in samples if sample.labels == {"a": "b {c}", "replica": "b"}] == [2.0]


def test_models_of_all_bases_the_bases_first() -> None:
    def answer(base: str, *names: str) -> bytes:
        cards = [{"id": base, "parent": None}, *({"id": name, "parent": base} for name in names)]
        return json.dumps({"object": "list", "data": cards}).encode()

    found = json.loads(merged_models([answer("one", "a", "same"), answer("two", "same")]))["data"]
    assert [card["id"] for card in found] == ["one", "two", "a", "same"]
    assert found[-1]["parent"] == "one"
