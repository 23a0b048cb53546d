"""The KV connector that vLLM loads in its scheduler and in every worker; it delegates to the two sides."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index

from server.engine.model.soft_prompts import SoftPromptLoader
from server.engine.vllm.residency import Reported
from server.engine.vllm.scheduler_side import Commands, SchedulerSide
from server.engine.vllm.worker_side import CacheLayer, WorkerSide, by_blocks, shard_of

logger = logging.getLogger(__name__)

BUDGET_KEY = "soft_prompt_host_bytes"
"""Key of the host memory's budget in the connector's extra configuration."""


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """The commands of one step."""

    commands: Commands = field(default_factory=Commands)


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What one worker, or several together, did in one step."""

    reported: Reported

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Add another worker's report."""
        if isinstance(other, WorkerReport):
            self.reported.add(other.reported)
        return self


class Statistics(KVConnectorStats):  # type: ignore[misc]
    """``ConnectorStats`` on vLLM's way to the process that reports statistics."""

    def is_empty(self) -> bool:
        """Whether there is nothing to report; there always is."""
        return False

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """The newer one; only the scheduler reports any."""
        return other

    def reset(self) -> None:
        """Clear the statistics."""
        self.data: dict[str, Any] = {}

    def reduce(self) -> dict[str, int | float]:
        """Nothing for vLLM's own log lines."""
        return {}


class SoftPromptConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Soft prompts as tokens whose keys and values are not computed; see ``scheduler_side`` and ``worker_side``."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(
                num_workers=vllm_config.parallel_config.world_size,
                budget_bytes=int(self._kv_transfer_config.get_from_extra_config(BUDGET_KEY, 0)),
                block_sizes=[group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups],
            )
        else:
            self._worker = self._make_worker(vllm_config)

    # In a worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take over this worker's blocks; layers of a draft model have no soft prompts."""
        modules = self._vllm_config.compilation_config.static_forward_context
        num_layers = self._vllm_config.model_config.get_total_num_hidden_layers()
        layers = []
        for index, group in enumerate(self._kv_cache_config.kv_cache_groups):
            for name in group.layer_names:
                place = extract_layer_index(name)
                if name in kv_caches and place < num_layers:
                    size = group.kv_cache_spec.block_size
                    cache = by_blocks(kv_caches[name], self._kv_cache_config.num_blocks)
                    layers.append(CacheLayer(place, index, size, cache, _writer(modules[name])))
        self._own_worker.register(layers)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Before the forward pass."""
        self._own_worker.before_step(self._commands)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded layer by layer."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved layer by layer."""

    def wait_for_save(self) -> None:
        """After the forward pass."""
        self._own_worker.after_step(self._commands)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Requests whose soft prompt cannot be loaded."""
        failed = self._own_worker.take_failed()
        return KVConnectorTransferResults(finished_recving=set(failed), failed_recving=failed)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """The worker's report on this step."""
        reported = self._own_worker.take_report()
        return None if reported is None else WorkerReport(reported)

    # In the scheduler

    def on_new_request(self, request: Any) -> None:
        """A request has arrived."""
        self._own_scheduler.new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """The tokens to load; see ``SchedulerSide.num_external_tokens``."""
        return self._own_scheduler.num_external_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """A request was given blocks."""
        self._own_scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        """All groups are loaded."""
        return tuple(range(len(self._kv_cache_config.kv_cache_groups)))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """The workers' commands for a step."""
        manager = self._kv_cache_manager
        if manager is None:
            raise AssertionError("the scheduler has bound no cache manager")
        return StepMetadata(self._own_scheduler.take_commands(scheduler_output, manager.get_block_ids))

    def update_connector_output(self, connector_output: Any) -> None:
        """The workers' reports on a step."""
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            self._own_scheduler.report(report.reported)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended."""
        self._own_scheduler.finished(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: Iterable[list[int]]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended."""
        self._own_scheduler.finished(request.request_id)
        return False, None

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed to another instance."""
        return False

    # In both

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """The scheduler's statistics; the workers have none."""
        if self._scheduler is None:
            return None
        return Statistics(data=msgspec.to_builtins(self._scheduler.take_stats()))

    def shutdown(self) -> None:
        """End the worker's thread."""
        if self._worker is not None:
            self._worker.close()

    @property
    def _commands(self) -> Commands:
        metadata = self._get_connector_metadata()
        return metadata.commands if isinstance(metadata, StepMetadata) else Commands()

    @property
    def _own_worker(self) -> WorkerSide:
        if self._worker is None:
            raise AssertionError("this connector is not a worker's")
        return self._worker

    @property
    def _own_scheduler(self) -> SchedulerSide:
        if self._scheduler is None:
            raise AssertionError("this connector is not the scheduler's")
        return self._scheduler

    @staticmethod
    def _make_worker(config: VllmConfig) -> WorkerSide:
        model = config.model_config
        shard = shard_of(
            get_tensor_model_parallel_rank(),
            get_tensor_model_parallel_world_size(),
            num_layers=model.get_total_num_hidden_layers(),
            num_heads=model.get_total_num_kv_heads(),
            head_dim=model.get_head_size(),
        )
        loader = SoftPromptLoader(
            embedding_width=model.get_inputs_embeds_size(),
            key_values_width=2 * shard.num_layers * shard.num_heads * shard.head_dim,
            head_width=model.get_hidden_size(),
            dtype=model.dtype,
            budget_bytes=0,
        )
        return WorkerSide(shard, loader.read, pin_memory=torch.cuda.is_available())


def _writer(module: Any) -> Any:
    """The attention backend's own function, for one layer, as its forward pass calls it."""

    def write(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        module.impl.do_kv_cache_update(module, keys, values, module.kv_cache, slots)

    return write
