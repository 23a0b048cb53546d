"""Loading soft prompts before their first request, and pinning them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Coroutine, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from prompt_store.errors import PromptNotFoundError, PromptStoreError
from prompt_store.types import PromptRef, PromptVersion
from server.api.soft_prompts.async_store import AsyncPromptStore
from server.api.soft_prompts.engine_source import check_task, soft_prompt_source
from server.api.soft_prompts.pin_budget import PinBudget, pinned_bytes
from server.engine.interface import Engine
from server.engine.types import SoftPromptSource
from server.errors import ServerError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Warmed:
    """The result of loading a soft prompt onto the device.

    Attributes:
        version: The version that was loaded.
        task_ids: The loaded tasks of a multitask prompt; None for other soft prompts.
        seconds: How long it took, without the lease.
    """

    version: PromptVersion
    task_ids: tuple[int, ...] | None
    seconds: float


@dataclass(slots=True)
class _Pin:
    """One pinned version.

    Attributes:
        lease: Holds the lease, so that the blob and its local copy are kept.
        payer: The tenant whose budget the pin counts to; None is the operator.
        sources: The pinned sources by task id; the key is None if the soft prompt has no tasks.
        aliases: The aliases that it is pinned for; None among them means it is pinned by its number.
    """

    lease: AsyncExitStack
    payer: str | None
    sources: dict[int | None, SoftPromptSource]
    aliases: set[str | None]


@dataclass(frozen=True, slots=True)
class _Follow:
    """Keep the target of an alias warm, and pinned if ``pin``; all tasks if ``task_id`` is None.

    Aliases that the settings name (``is_operators``) are not limited by a budget.
    """

    name: str
    alias: str
    task_id: int | None
    pin: bool
    is_operators: bool = False


class Warmer:
    """Warms soft prompts and holds pins. Used on the event loop only, so it needs no lock between awaits.

    A pin holds a lease and a reference in the engine's host memory. A pin of an alias moves with the alias.
    """

    def __init__(self, engine: Engine, store: AsyncPromptStore, budget: PinBudget) -> None:
        self._engine = engine
        self._budget = budget
        self._store = store
        self._pins: dict[tuple[str, int], _Pin] = {}
        self._follows: set[_Follow] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        """Background tasks. No TaskGroup: one failure must not end the others."""
        self._named: list[tuple[PromptRef, bool]] = []
        """Versions that the settings name by number, and whether to pin each."""
        self._restoring: asyncio.Task[None] | None = None
        self._follow_lock = asyncio.Lock()
        """Held while a promotion is followed: an older promotion must not finish last, and a pin that ends meanwhile
        must not be restored."""

    @property
    def is_restoring(self) -> bool:
        """Whether soft prompts are still being reloaded after a restart of the engine."""
        return self._restoring is not None and not self._restoring.done()

    def restore(self) -> None:
        """After a restart of the engine, reload followed, pinned and preloaded soft prompts in the background."""
        if self._restoring is not None:
            self._restoring.cancel()
        self._restoring = self._start_task(self._restore(), "restore soft prompts")

    def pinned_versions(self, name: str) -> list[int]:
        """The versions of a name that are pinned, in order."""
        return sorted(version for pinned, version in self._pins if pinned == name)

    def is_pinned(self, version: PromptVersion) -> bool:
        """Whether a version is pinned, or one of its tasks."""
        return (version.name, version.version) in self._pins

    async def warm(
        self, ref: PromptRef, *, task_id: int | None = None, pin: bool = False, is_operators: bool = False
    ) -> Warmed:
        """Load a soft prompt onto the device.

        Args:
            ref: The soft prompt; a pin of an alias follows the alias.
            task_id: The task of a multitask prompt; None is all of them, one after the other.
            pin: Keep its files on this machine and its rows in host memory; this counts to its owner's budget.
            is_operators: Whether the settings name it; then no budget applies.

        Raises:
            PromptStoreError: If the version does not exist, or its files are not available.
            InvalidRequestError: If the task does not exist.
            PinBudgetError: If it may not be pinned; nothing was loaded or pinned then.
            EngineError: If the engine cannot load it, or does not serve.
        """
        async with AsyncExitStack() as lease:
            leased = await lease.enter_async_context(self._store.lease(ref, None))
            version = leased.version
            if task_id is not None:
                check_task(version, task_id)
            task_ids = _task_ids(version, task_id)
            sources = {task: soft_prompt_source(leased, task) for task in task_ids or (None,)}
            payer = None if is_operators else version.owner
            if pin:
                self._check_budget(version, sources, ref.alias, payer)
            started = time.monotonic()
            for source in sources.values():
                await self._engine.prepare(source)
            warmed = Warmed(version, task_ids, time.monotonic() - started)
            if pin:
                # A version deleted meanwhile could never be unpinned, because no request could name it.
                await self._store.resolve(_ref(version.name, version.version))
                self._check_budget(version, sources, ref.alias, payer)  # other pins may have been added meanwhile
                if ref.alias is not None:
                    self._follows.add(_Follow(ref.name, ref.alias, task_id, True, is_operators))
                await self._pin(version, sources, ref.alias, lease, payer)
        return warmed

    async def unpin(self, ref: PromptRef, *, task_id: int | None = None) -> PromptVersion:
        """End a version's pin, or the pin of one task, if there is one. Its aliases are no longer followed.

        Raises:
            PromptStoreError: If the version does not exist.
            InvalidRequestError: If the task does not exist.
        """
        async with self._follow_lock:
            version = await self._store.resolve(ref)
            if task_id is not None:
                check_task(version, task_id)
            pin = self._pins.get((version.name, version.version))
            aliases = {ref.alias} | (pin.aliases if pin is not None else set())
            self._follows = {
                follow
                for follow in self._follows
                if (follow.name, follow.pin) != (ref.name, True)
                or follow.alias not in aliases
                or task_id not in (None, follow.task_id)
            }
            await self._end(version.name, version.version, task_id)
            if task_id is None:
                self._named = [(named, pins) for named, pins in self._named if not (pins and _names(named, version))]
                # A promotion that is not followed yet has left the pin at the alias's previous version.
                await self._leave(version, aliases - {None})
            return version

    async def forget(self, name: str, version: int | None = None) -> None:
        """End the pins of a deleted version, or of a deleted name."""
        self._named = [
            (ref, pins) for ref, pins in self._named if ref.name != name or version not in (None, ref.version)
        ]
        if version is None:
            self._follows = {follow for follow in self._follows if follow.name != name}
        for pinned in self.pinned_versions(name):
            if version in (None, pinned):
                await self._end(name, pinned)

    def promoted(self, name: str, alias: str) -> None:
        """After a move of an alias, warm or pin its new version in the background."""
        if any((follow.name, follow.alias) == (name, alias) for follow in self._follows):
            self._start_task(self._follow(name, alias), f"warm {name}@{alias}")

    def changed(self, names: Collection[str] | None) -> None:
        """Handle changes of these names by other servers; None means all names."""
        held = {name for name, _ in self._pins} | {follow.name for follow in self._follows}
        for name in held if names is None else held.intersection(names):
            self._start_task(self._refresh(name), f"refresh {name}")

    async def start(self, *, preload: Iterable[str], pin: Iterable[str]) -> None:
        """Warm and pin the soft prompts of the settings; failures are logged as warnings.

        Aliases are followed from here on, even those that do not exist yet.
        """
        for names, pins in ((preload, False), (pin, True)):
            for name in names:
                try:
                    ref = PromptRef.parse(name)
                except ValueError as error:
                    logger.warning("%s cannot be warmed: %s", name, error)
                    continue
                if ref.alias is not None:
                    self._follows.add(_Follow(ref.name, ref.alias, None, pins, is_operators=True))
                else:
                    self._named.append((ref, pins))
                await self._try_to_warm(ref, None, pins, is_operators=True)

    async def close(self) -> None:
        """End the background tasks and all leases."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for pin in self._pins.values():
            await pin.lease.aclose()
        self._pins.clear()

    # Inside

    def _start_task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _restore(self) -> None:
        for name, alias in {(follow.name, follow.alias) for follow in self._follows}:
            await self._follow(name, alias)
        for ref, pins in list(self._named):
            await self._try_to_warm(ref, None, pins, is_operators=True)
        for pin in list(self._pins.values()):
            for source in list(pin.sources.values()):
                try:
                    await self._engine.prepare(source)
                except ServerError as error:
                    logger.warning("soft prompt %s cannot be warmed: %s", source.digest[:12], error)

    async def _follow(self, name: str, alias: str) -> None:
        async with self._follow_lock:
            for follow in [follow for follow in self._follows if (follow.name, follow.alias) == (name, alias)]:
                ref = PromptRef(name, alias=alias)
                await self._try_to_warm(ref, follow.task_id, follow.pin, is_operators=follow.is_operators)

    async def _refresh(self, name: str) -> None:
        """Follow the aliases of a name, and end the pins of deleted versions."""
        for alias in {follow.alias for follow in self._follows if follow.name == name}:
            await self._follow(name, alias)
        async with self._follow_lock:
            for version in self.pinned_versions(name):
                try:
                    await self._store.resolve(_ref(name, version))
                except PromptNotFoundError:
                    await self._end(name, version)
                except PromptStoreError as error:
                    logger.warning("cannot check whether %s still exists: %s", _ref(name, version), error)

    async def _try_to_warm(self, ref: PromptRef, task_id: int | None, pin: bool, *, is_operators: bool) -> None:
        try:
            warmed = await self.warm(ref, task_id=task_id, pin=pin, is_operators=is_operators)
        except (PromptStoreError, ServerError) as error:
            logger.warning("%s cannot be %s: %s", ref, "pinned" if pin else "warmed", error)
        else:
            logger.info("%s is warm after %.3f s", _ref(ref.name, warmed.version.version), warmed.seconds)

    def _check_budget(
        self,
        version: PromptVersion,
        sources: dict[int | None, SoftPromptSource],
        alias: str | None,
        payer: str | None,
    ) -> None:
        """Raise PinBudgetError if a pin may not be added. Pins that end because their alias moves make room."""
        pin = self._pins.get((version.name, version.version))
        held = pin.sources if pin is not None else {}
        model = self._engine.model
        adding = {
            source.identity: pinned_bytes(source, model) for task, source in sources.items() if task not in held
        }
        left = [self._pins[version.name, other] for other in self.pinned_versions(version.name)]
        ending = [
            (other.payer, source.identity)
            for other in left
            if other is not pin and alias is not None and other.aliases == {alias}
            for source in other.sources.values()
        ]
        self._budget.check(pin.payer if pin is not None else payer, adding, ending)

    async def _pin(
        self,
        version: PromptVersion,
        sources: dict[int | None, SoftPromptSource],
        alias: str | None,
        lease: AsyncExitStack,
        payer: str | None,
    ) -> None:
        pin = self._pins.get((version.name, version.version))
        if pin is None:
            pin = self._pins[version.name, version.version] = _Pin(lease.pop_all(), payer, {}, set())
        pin.aliases.add(alias)
        for task, source in sources.items():
            # A second lease of the version has the same path.
            if task not in pin.sources:
                pin.sources[task] = source
                self._budget.add(pin.payer, source.identity, pinned_bytes(source, self._engine.model))
            self._engine.pin(source)
        await self._leave(version, {alias} - {None})

    async def _leave(self, version: PromptVersion, aliases: set[str | None]) -> None:
        """End the pins of other versions that exist for these aliases only."""
        for other in self.pinned_versions(version.name):
            held = self._pins.get((version.name, other))
            if held is not None and other != version.version and held.aliases & aliases:
                held.aliases -= aliases
                if not held.aliases:
                    await self._end(version.name, other)

    async def _end(self, name: str, version: int, task_id: int | None = None) -> None:
        pin = self._pins.get((name, version))
        if pin is None:
            return
        ended = [task for task in pin.sources if task_id in (None, task)]
        for identity, source in [(pin.sources[task].identity, pin.sources.pop(task)) for task in ended]:
            self._budget.remove(pin.payer, identity)
            # The same content may be pinned under another name.
            if not any(
                identity == other.identity for others in self._pins.values() for other in others.sources.values()
            ):
                self._engine.unpin(source)
        if not pin.sources:
            del self._pins[name, version]
            await pin.lease.aclose()


def _names(ref: PromptRef, version: PromptVersion) -> bool:
    return (ref.name, ref.version) == (version.name, version.version)


def _ref(name: str, version: int) -> PromptRef:
    return PromptRef(name, version=version, alias=None)


def _task_ids(version: PromptVersion, task_id: int | None) -> tuple[int, ...] | None:
    if version.num_tasks is None:
        return None
    return tuple(range(version.num_tasks)) if task_id is None else (task_id,)
