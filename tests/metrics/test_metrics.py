from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from prompt_store.blobs.blobs import TierStats
from prompt_store.histogram import LOAD_SECONDS_BOUNDS, Histogram
from prompt_store.types import StoreTotals
from server.engine.stats import BATCH_SIZE_BOUNDS, EngineStats, EngineTierStats
from server.metrics.labels import BASE_LABEL, OTHER_LABEL
from server.metrics.metrics import Metrics
from server.metrics.scrape import PREFIX, StoreState
from tests.docker.tools import run


def load_seconds() -> Histogram:
    """A histogram of five loads, two of them within a tenth of a second."""
    histogram = Histogram.empty(LOAD_SECONDS_BOUNDS)
    for seconds in (0.05, 0.1, 0.2, 0.2, 40.0):
        histogram.observe(LOAD_SECONDS_BOUNDS, seconds)
    return histogram


TIERS = [TierStats(tier, 1, 2, 4, 5, 6, 7, 8, load_seconds()) for tier in ("disk", "object_store")]
STORE = StoreState(StoreTotals(3, 5), TIERS, False, 4096)


def make(stats: EngineStats | None = None, top_prompts: int = 2) -> Metrics:
    return Metrics(read_stats=lambda: stats or EngineStats(), read_store=lambda: STORE, top_prompts=top_prompts)


def make_used() -> Metrics:
    """Metrics with at least one sample each."""
    metrics = make(EngineStats(num_blocks=8, host=EngineTierStats(load_seconds=load_seconds())))
    metrics.count_request(None, "stop")
    metrics.count_request("sentiment", "error", version="3", first_token_seconds=0.02, seconds=0.3)
    metrics.count_tenant("acme", "stop", prompt_tokens=7, completion_tokens=3)
    metrics.count_shadow("sentiment", "4", "different", -0.25)
    metrics.count_http("GET", "/v1/prompts/{id}", 200)
    metrics.count_error("model_not_found")
    latencies = metrics.of_tier(is_batch=False)
    for observe in (latencies.observe_first_token, latencies.observe_inter_token, latencies.observe_request):
        observe(0.02)
    latencies.observe_phases(0.001, 0.02)
    latencies.observe_decode(0.3)
    return metrics


def families(metrics: Metrics) -> dict[str, Metric]:
    text, _ = metrics.render("")
    return {family.name: family for family in text_string_to_metric_families(text.decode())}


def test_every_metric_is_prefixed_and_explained() -> None:
    for family in families(make_used()).values():
        assert family.name.startswith((PREFIX, "process_"))
        assert family.documentation


def test_the_names_of_the_endpoint_picker_protocol_are_gauges_with_its_meaning() -> None:
    """The Gateway API Inference Extension needs these metrics of a model server; see docs/operations.md."""
    stats = EngineStats(num_waiting=3, num_running=2, num_blocks=8, num_used_blocks=4, block_size=16)
    found = families(make(stats))
    expected = {
        "num_requests_waiting": 3,
        "num_requests_running": 2,
        "kv_cache_usage_ratio": 0.5,
        "kv_cache_block_size_tokens": 16,
        "kv_cache_blocks": 8,
    }
    documented = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    for name, value in expected.items():
        family = found[PREFIX + name]
        assert (family.type, [sample.value for sample in family.samples]) == ("gauge", [value])
        assert f"Spec: {PREFIX}{name}\n" in documented


def test_promtool_has_no_complaints() -> None:
    text, _ = make_used().render("")
    assert run("promtool", "check", "metrics", text=text.decode()) == ""


@pytest.mark.parametrize(
    "name",
    ["num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio", "num_preemptions_total"]
    + ["prefix_cache_queries_total", "prefix_cache_hits_total", "prompt_tokens_total", "generation_tokens_total"]
    + [
        "virtual_tokens_total",
        "soft_prompts_registered",
        "soft_prompt_versions",
        "batch_size_count",
        "step_seconds_count",
    ]
    + ["batch_distinct_prompts_count", "batch_distinct_prompts_max", "request_timeouts_total"]
    + ["engine_restarts_total", "engine_step_timeouts_total"]
    + [f"request_{phase}_time_seconds_count" for phase in ("queue", "prefill", "decode")]
    + [f'soft_prompt_{what}{{tier="device"}}' for what in ("resident", "resident_bytes")]
    + [f'soft_prompt_{what}_total{{tier="device"}}' for what in ("loads", "evictions")]
    + [f'soft_prompt_{what}{{tier="disk"}}' for what in ("resident", "resident_bytes")]
    + [f'soft_prompt_{what}_total{{tier="disk"}}' for what in ("loads", "evictions", "hits", "misses", "corrupt")]
    + [f'soft_prompt_{what}{{tier="host"}}' for what in ("resident", "resident_bytes")]
    + [
        f'soft_prompt_{what}_total{{tier="{tier}"}}'
        for tier in ("device", "host")
        for what in ("loads", "evictions", "hits", "misses")
    ]
    + ['soft_prompt_load_seconds_bucket{le="+Inf",tier="object_store"}', "catalog_available"]
    + [f"{name}_seconds_count" for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency")]
    + ['requests_total{outcome="stop",prompt="-",version="-"}', 'request_errors_total{code="model_not_found"}'],
)
def test_expected_names_exist(name: str) -> None:
    text, _ = make_used().render("")
    assert any(line.startswith(f"{PREFIX}{name} ") for line in text.decode().splitlines())


def test_buckets_reach_from_the_fastest_step_to_the_slowest_request() -> None:
    """A quantile in the first or last bucket has no meaning."""
    bounds = {
        family.name: [float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels]
        for family in families(make_used()).values()
        if family.type == "histogram" and not family.name.endswith("load_seconds")
    }
    assert len(bounds) == 21
    for name, found in bounds.items():
        assert found == sorted(found), name
        assert found[-1] == math.inf
        ratios = [after / before for before, after in itertools.pairwise(found[:-1]) if before]
        assert max(ratios) <= 5, name
    assert bounds["prelude_inter_token_latency_seconds"][0] <= 0.001
    assert bounds["prelude_e2e_request_latency_seconds"][-2] >= 300


def test_values_are_read_at_each_scrape() -> None:
    stats = EngineStats(num_blocks=8)
    metrics = make(stats)
    assert families(metrics)["prelude_kv_cache_usage_ratio"].samples[0].value == 0
    stats.num_used_blocks = 2
    assert families(metrics)["prelude_kv_cache_usage_ratio"].samples[0].value == 0.25


def test_steps_are_counted_by_size() -> None:
    stats = EngineStats()
    for size in (1, 2, 3, 5000):
        stats.batch_size.observe(BATCH_SIZE_BOUNDS, size)
    samples = families(make(stats))["prelude_batch_size"].samples
    found = {sample.labels["le"]: sample.value for sample in samples if "le" in sample.labels}
    assert (found["1.0"], found["2.0"], found["4.0"], found["1024.0"], found["+Inf"]) == (1, 2, 3, 3, 4)
    assert {sample.name: sample.value for sample in samples if not sample.labels} == {
        "prelude_batch_size_count": 4,
        "prelude_batch_size_sum": 5006,
    }


def test_tiers_of_the_engine_have_metrics() -> None:
    host = EngineTierStats(
        resident=1,
        resident_bytes=2,
        hits=3,
        misses=4,
        evictions=6,
        load_seconds=load_seconds(),
    )
    found = families(make(EngineStats(host=host, soft_prompt_hits=7, soft_prompt_misses=8)))

    def value(name: str, tier: str, **labels: str) -> float:
        (sample,) = [
            sample
            for family in found.values()
            for sample in family.samples
            if sample.name == f"prelude_soft_prompt_{name}" and sample.labels == {"tier": tier, **labels}
        ]
        return sample.value

    names = ("resident", "resident_bytes", "hits_total", "misses_total", "loads_total", "evictions_total")
    assert [value(name, "host") for name in names] == [1, 2, 3, 4, 5, 6]
    assert [value(name, "device") for name in names[2:4]] == [7, 8]
    assert value("load_seconds_sum", "host") == pytest.approx(40.55)
    assert value("load_seconds_bucket", "host", le="0.1") == 2
    assert value("load_seconds_count", "host") == 5


def test_usage_is_zero_without_blocks() -> None:
    assert families(make())["prelude_kv_cache_usage_ratio"].samples[0].value == 0


def test_the_prompt_label_has_a_limited_number_of_values() -> None:
    metrics = make(top_prompts=2)
    for name in (None, "a", OTHER_LABEL, "b", "c", "a"):
        metrics.count_request(name, "stop")
    samples = [s for s in families(metrics)["prelude_requests"].samples if s.name.endswith("_total")]
    counts = {sample.labels["prompt"]: sample.value for sample in samples}
    assert counts == {BASE_LABEL: 1, "a": 2, "b": 1, OTHER_LABEL: 2}


def test_golden_checks_take_no_place_among_the_labels() -> None:
    metrics = make()
    metrics.count_request("sentiment.golden-check-0123abcd", "stop")
    samples = families(metrics)["prelude_requests"].samples
    assert {sample.labels["prompt"] for sample in samples} == {"other"}


def test_the_build_and_the_free_space_are_reported() -> None:
    found = families(make())
    (build,) = found["prelude_build_info"].samples
    assert build.value == 1.0
    assert build.labels.keys() == {"version", "python"}
    assert found["prelude_store_disk_free_bytes"].samples[0].value == STORE.free_bytes


def test_labels_go_to_recently_used_names() -> None:
    """A replaced name loses its series, and its requests are not counted again."""
    metrics = make(top_prompts=2)
    for outcome in ("stop", "error"):
        metrics.count_request("junk1", outcome)
    metrics.count_request("junk2", "stop")
    for _ in range(20):
        metrics.count_request("honest", "stop")

    def counts() -> dict[tuple[str, str], float]:
        samples = [s for s in families(metrics)["prelude_requests"].samples if s.name.endswith("_total")]
        return {(sample.labels["prompt"], sample.labels["outcome"]): sample.value for sample in samples}

    assert counts() == {
        ("junk1", "stop"): 1,
        ("junk1", "error"): 1,
        ("honest", "stop"): 19,
        (OTHER_LABEL, "stop"): 1,
    }
    for _ in range(8):
        metrics.count_request("next", "length")
    assert ("junk1", "stop") not in counts()
    assert ("junk1", "error") not in counts()
    for _ in range(60):  # a returning name starts at 0
        metrics.count_request("junk1", "stop")
    assert 0 < counts()[("junk1", "stop")] < 60
    assert {prompt for prompt, _ in counts()} == {"junk1", "honest", OTHER_LABEL}


def counts_of(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """The values of a counter by its labels, in alphabetical order of their names."""
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for sample in families(metrics)[PREFIX + name].samples
        if sample.name.endswith("_total")
    }


def test_versions_have_labels_in_limited_number() -> None:
    metrics = make(top_prompts=1)
    for version in "123456":
        metrics.count_request("p", "stop", version=version, seconds=0.1)
    metrics.count_request("p", "error", version="4")
    expected = {("stop", "p", version): 1.0 for version in "1234"}
    assert counts_of(metrics, "requests") == {**expected, ("error", "p", "4"): 1.0, ("stop", "p", "other"): 2.0}
    for _ in range(5):  # a version that is used now gets the label of one that is not
        metrics.count_request("p", "stop", version="9", seconds=0.1)
    found = counts_of(metrics, "requests")
    assert len({version for _, _, version in found}) == 5
    assert found["stop", "p", "9"] > 0
    latencies = families(metrics)["prelude_prompt_e2e_request_latency_seconds"].samples
    assert {sample.labels["version"] for sample in latencies} == {version for _, _, version in found}
    for _ in range(40):  # and so does another soft prompt
        metrics.count_request("q", "stop", version="1")
    assert {prompt for _, prompt, _ in counts_of(metrics, "requests")} == {"q", OTHER_LABEL}


def test_tenants_have_labels_in_limited_number() -> None:
    metrics = make(top_prompts=2)
    for tenant in ("", "a", "a", "b", "c", OTHER_LABEL):
        metrics.count_tenant(tenant, "stop", prompt_tokens=5, completion_tokens=2)
    assert counts_of(metrics, "tenant_requests") == {
        ("stop", BASE_LABEL): 1,
        ("stop", "a"): 2,
        ("stop", "b"): 1,
        ("stop", OTHER_LABEL): 2,
    }
    tokens = counts_of(metrics, "tenant_tokens")
    assert (tokens["prompt", "a"], tokens["completion", "a"]) == (10, 4)
    for _ in range(9):
        metrics.count_tenant("c", "stop", prompt_tokens=5, completion_tokens=2)
    tenants = {tenant for _, tenant in counts_of(metrics, "tenant_requests")}
    assert "c" in tenants
    assert len(tenants) == 4
    assert {tenant for _, tenant in counts_of(metrics, "tenant_tokens")} == tenants


def test_shadows_are_counted_with_the_size_of_their_difference() -> None:
    metrics = make()
    metrics.count_shadow("p", "2", "different", -0.25)
    metrics.count_shadow("p", "2", "dropped")
    found = families(metrics)
    assert counts_of(metrics, "shadow_requests") == {("p", "different", "2"): 1, ("p", "dropped", "2"): 1}
    (total,) = [one for one in found["prelude_shadow_logprob_difference_nats"].samples if one.name.endswith("_sum")]
    assert total.value == 0.25


def test_http_requests_are_counted_by_route_and_status() -> None:
    metrics = make()
    for method, route, status in (("GET", "/live", 200), ("BREW", None, 405), ("POST", "/v1/completions", None)):
        metrics.count_http(method, route, status)
    assert counts_of(metrics, "http_requests") == {
        ("GET", "/live", "200"): 1,
        (OTHER_LABEL, OTHER_LABEL, "405"): 1,
        ("POST", "/v1/completions", "-"): 1,
    }


def test_the_process_is_measured() -> None:
    found = families(make())
    assert found["process_resident_memory_bytes"].samples[0].value > 0
    assert found["process_open_fds"].samples[0].value > 0


def test_registries_are_separate() -> None:
    one, two = make(), make()
    one.count_error("x")
    assert b'code="x"' not in two.render("")[0]


def test_openmetrics_has_its_content_type_and_end_marker() -> None:
    text, content_type = make().render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")


def test_adapters_are_counted_by_tier() -> None:
    host = EngineTierStats(resident=2, resident_bytes=64, hits=5, misses=3, evictions=1, load_seconds=load_seconds())
    found = families(make(EngineStats(adapters=host, max_batch_distinct_adapters=7)))
    values = {
        name: {sample.labels["tier"]: sample.value for sample in found[f"{PREFIX}adapter_{name}"].samples}["host"]
        for name in ("resident", "resident_bytes", "hits", "misses", "evictions", "loads")
    }
    assert values == {"resident": 2, "resident_bytes": 64, "hits": 5, "misses": 3, "evictions": 1, "loads": 5}
    assert found[f"{PREFIX}batch_distinct_adapters_max"].samples[0].value == 7


def test_the_adapters_of_requests_in_flight_have_one_series() -> None:
    metrics = Metrics(read_stats=EngineStats, read_store=lambda: STORE, top_prompts=2, max_num_seqs=64)
    use = metrics.adapter_use

    def labels() -> dict[str, str]:
        (sample,) = families(metrics)[f"{PREFIX}lora_requests_info"].samples
        assert sample.value > 1e9
        return sample.labels

    for names in ({"b"}, {"a", "b"}, set()):
        use.wait(names)
    use.begin({"a", "b"})
    assert labels() == {"max_lora": "64", "running_lora_adapters": "a,b", "waiting_lora_adapters": "b"}
    use.end({"a", "b"}, has_begun=True)
    use.end({"b"}, has_begun=False)
    use.end(set(), has_begun=True)
    assert labels() == {"max_lora": "64", "running_lora_adapters": "", "waiting_lora_adapters": ""}


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8"])
def test_the_metrics_of_another_program_keep_their_names(accept: str) -> None:
    text = (
        '# HELP vllm:waiting Waiting.\n# TYPE vllm:waiting gauge\nvllm:waiting{model="a"} 3.0\n'
        "# HELP vllm:tokens_total Tokens.\n# TYPE vllm:tokens_total counter\nvllm:tokens_total 5.0\n"
    )
    metrics = Metrics(read_stats=EngineStats, read_store=lambda: STORE, top_prompts=1, read_exposition=lambda: text)
    body, _ = metrics.render(accept)
    lines = body.decode().splitlines()
    assert 'vllm:waiting{model="a"} 3.0' in lines
    assert "vllm:tokens_total 5.0" in lines
    assert any(line.startswith("prelude_num_requests_running ") for line in lines)
