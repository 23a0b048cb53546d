"""LoRA with PEFT: the configuration, the trained state, and the size of the change."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer

from server.training.errors import SettingsError
from server.training.settings import ALL_LINEAR, TrainSettings

ADAPTER = "default"
"""PEFT's name of the trained adapter within the model."""

DEFAULT_SCALE = 2.0
"""Factor of the change without ``--lora-alpha``, for every rank, with and without rsLoRA."""


def make_adapter(base: Any, settings: TrainSettings) -> PeftModel:
    """Add an untrained adapter, which changes nothing yet, to a frozen model.

    Raises:
        SettingsError: If a target is no module of the model, or one that PEFT cannot adapt.
    """
    targets: str | list[str] = settings.target_modules
    if targets != ALL_LINEAR:
        targets = settings.target_names
        _check_targets(base, targets)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if settings.has_head else TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=_alpha(settings),  # type: ignore[arg-type]  # PEFT only divides it
        target_modules=targets,
        use_rslora=settings.use_rslora,
        lora_dropout=settings.lora_dropout,
    )
    with warnings.catch_warnings():
        # PEFT sets fan_in_fan_out for each module as it has to be, and warns about it.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        try:
            return get_peft_model(base, config)
        except ValueError as error:
            raise SettingsError(f"target_modules: PEFT rejects {settings.target_modules!r}: {error}") from error


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """A copy of the trained weights on the CPU, by parameter."""
    return {
        name: weight.detach().to("cpu", copy=True).contiguous()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def restore_adapter(model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    """Load a state of ``adapter_state``.

    Raises:
        KeyError: If the model's adapter has other parameters.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if trained.keys() != state.keys():
        raise KeyError(f"other parameters: {sorted(trained.keys() ^ state.keys())[:3]}")
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(state[name])


@torch.no_grad()
def mean_change(model: PeftModel) -> float:
    """Mean over the adapted modules of the change's Frobenius norm, as a share of the weight's.

    The norm of ``scale * B A`` follows from products of size rank x rank: ``||B A||^2 = sum((B^T B) * (A A^T))``.
    """
    shares: list[float] = []
    for module, a, b in _factors(model):
        square = float(((b.T @ b) * (a @ a.T)).sum())
        weight = module.get_base_layer().weight
        shares.append(module.scaling[ADAPTER] * math.sqrt(max(square, 0.0)) / float(weight.float().norm()))
    return sum(shares) / len(shares)


def _factors(model: PeftModel) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor]]:
    """Each adapted module, with A [rank, in] and B [out, rank] in float32."""
    adapted: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for module in adapted:
        if ADAPTER in module.lora_embedding_A:
            yield module, module.lora_embedding_A[ADAPTER].float(), module.lora_embedding_B[ADAPTER].float()
        else:
            yield module, module.lora_A[ADAPTER].weight.float(), module.lora_B[ADAPTER].weight.float()


def _alpha(settings: TrainSettings) -> float:
    if settings.lora_alpha is not None:
        return settings.lora_alpha
    alpha = DEFAULT_SCALE * (math.sqrt(settings.rank) if settings.use_rslora else settings.rank)
    return int(alpha) if alpha.is_integer() else alpha


def _check_targets(base: Any, targets: Sequence[str]) -> None:
    """PEFT ignores a target that no module matches if another target has one."""
    names = [name for name, module in base.named_modules() if getattr(module, "weight", None) is not None]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if unknown:
        known = sorted({name.rpartition(".")[2] for name in names})
        raise SettingsError(
            f"target_modules: the model has no module {unknown[0]!r}; it has {', '.join(known)}. "
            f"{ALL_LINEAR} selects all linear layers but the head"
        )
