"""Loading soft prompts and adapters before their first request, and pinning them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final, Literal

from prompt_store.errors import PromptNotFoundError, PromptStoreError
from prompt_store.types import LeasedPrompt, PromptKind, PromptRef, PromptVersion
from server.api.soft_prompts.async_store import AsyncPromptStore
from server.api.soft_prompts.engine_source import adapter_source, check_task, soft_prompt_source
from server.api.soft_prompts.pin_budget import PinBudget, pinned_bytes
from server.engine.interface import Engine
from server.engine.types import AdapterSource, SoftPromptSource
from server.errors import ServerError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Warmed:
    """The result of loading a soft prompt or an adapter onto the device.

    Attributes:
        version: The version that was loaded.
        task_ids: The loaded tasks of a multitask prompt; None for all others.
        seconds: How long it took, without the lease.
    """

    version: PromptVersion
    task_ids: tuple[int, ...] | None
    seconds: float


_OVER: Final = "over"

_Part = int | Literal["over"] | None
"""A part of a version that is pinned: a task; None if there are no tasks; or the adapter that it was trained over."""

_Sources = dict[_Part, SoftPromptSource | AdapterSource]


@dataclass(slots=True)
class _Pin:
    """One pinned version.

    Attributes:
        lease: Holds the leases, so that blobs and their local copies are kept.
        payer: The tenant whose budget the pin counts to; None is the operator.
        sources: The pinned sources.
        aliases: The aliases that it is pinned for; None among them means it is pinned by its number.
    """

    lease: AsyncExitStack
    payer: str | None
    sources: _Sources
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
    """Warms soft prompts and adapters, and holds pins. Used on the event loop only: no lock between awaits.

    A pin holds a lease and a reference in the engine's host memory. A pin of an alias moves with the alias.
    """

    def __init__(self, engine: Engine, store: AsyncPromptStore, budget: PinBudget) -> None:
        self.on_warmed: Callable[[PromptVersion], None] = lambda version: None
        """Called with each version that has been loaded."""
        self._engine = engine
        self._budget = budget
        self._store = store
        self._pins: dict[tuple[str, int], _Pin] = {}
        self._follows: set[_Follow] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        """Background tasks. No TaskGroup: one failure must not end the others."""
        self._targets: dict[tuple[str, str], set[int]] = {}
        """By name and followed alias, the versions that the alias sends requests to."""
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
        self,
        ref: PromptRef,
        *,
        task_id: int | None = None,
        pin: bool = False,
        is_operators: bool = False,
        canary_of: str | None = None,
    ) -> Warmed:
        """Load a soft prompt, with the adapter that it was trained over, or an adapter onto the device.

        Args:
            ref: The version; a pin of an alias follows the alias.
            task_id: The task of a multitask prompt; None is all of them, one after the other.
            pin: Keep its files on this machine and its numbers in host memory; this counts to its owner's budget.
            is_operators: Whether the settings name it; then no budget applies.
            canary_of: The alias for which a canary is pinned, which ``ref`` names by its number.

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
            sources = await self._sources_of(leased, task_ids, lease)
            payer = None if is_operators else version.owner
            alias = ref.alias if canary_of is None else canary_of
            if pin:
                self._check_budget(version, sources, alias, payer)
            started = time.monotonic()
            await self._prepare(sources)
            self.on_warmed(version)
            warmed = Warmed(version, task_ids, time.monotonic() - started)
            if pin:
                # A version deleted meanwhile could never be unpinned, because no request could name it.
                await self._store.resolve(_ref(version.name, version.version))
                self._check_budget(version, sources, alias, payer)  # other pins may have been added meanwhile
                if ref.alias is not None:
                    self._follows.add(_Follow(ref.name, ref.alias, task_id, True, is_operators))
                await self._pin(version, sources, alias, lease, payer)
        return warmed

    async def warm_for_caller(self, ref: PromptRef, *, task_id: int | None, pin: bool) -> Warmed:
        """Warm what a request names; the canaries of a pinned alias follow in the background.

        Raises what ``warm`` does.
        """
        warmed = await self.warm(ref, task_id=task_id, pin=pin)
        if pin and ref.alias is not None:
            name, alias = ref.name, ref.alias
            self._start_task(self._follow(name, alias, canaries_only=True), f"warm the canaries of {name}@{alias}")
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
            for alias in aliases - {None}:
                self._targets.pop((ref.name, str(alias)), None)
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
            self._targets = {key: numbers for key, numbers in self._targets.items() if key[0] != name}
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
        for (name, version), pin in list(self._pins.items()):
            try:
                await self._prepare(dict(pin.sources))
            except ServerError as error:
                logger.warning("%s cannot be warmed: %s", _ref(name, version), error)

    async def _sources_of(
        self, leased: LeasedPrompt, task_ids: tuple[int, ...] | None, stack: AsyncExitStack
    ) -> _Sources:
        """What has to be loaded for a leased version; ``stack`` gets the lease of its adapter."""
        if leased.version.kind is PromptKind.ADAPTER:
            return {None: adapter_source(leased)}
        sources: _Sources = {task: soft_prompt_source(leased, task) for task in task_ids or (None,)}
        if leased.version.over is not None:
            over = self._store.lease(PromptRef.parse(leased.version.over), None)
            sources[_OVER] = adapter_source(await stack.enter_async_context(over))
        return sources

    async def _prepare(self, sources: _Sources) -> None:
        """Load an adapter, or each task of a soft prompt with the adapter that it was trained over."""
        over = sources.get(_OVER)
        adapter = over if isinstance(over, AdapterSource) else None
        for source in sources.values():
            if isinstance(source, SoftPromptSource):
                await self._engine.prepare(source, adapter)
            elif source is not over:
                await self._engine.prepare(None, source)

    async def _follow(self, name: str, alias: str, *, canaries_only: bool = False) -> None:
        """Warm or pin the versions that an alias sends requests to; its own may be warm already."""
        async with self._follow_lock:
            follows = [follow for follow in self._follows if (follow.name, follow.alias) == (name, alias)]
            canaries = await self._canaries_of(name, alias) if follows else ()
            for follow in follows:
                task_id, is_operators = follow.task_id, follow.is_operators
                if not canaries_only:
                    ref = PromptRef(name, alias=alias)
                    await self._try_to_warm(ref, task_id, follow.pin, is_operators=is_operators)
                for number in canaries:
                    await self._try_to_warm(
                        _ref(name, number), task_id, follow.pin, is_operators=is_operators, canary_of=alias
                    )

    async def _canaries_of(self, name: str, alias: str) -> Collection[int]:
        """The canaries of an alias; notes all versions that it sends requests to."""
        self._targets.pop((name, alias), None)
        try:
            prompt = await self._store.get_prompt(name)
        except PromptStoreError:
            return ()
        canaries = prompt.rollouts[alias].canaries if alias in prompt.rollouts else {}
        if alias in prompt.aliases:
            self._targets[name, alias] = {prompt.aliases[alias], *canaries}
        return tuple(canaries)

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

    async def _try_to_warm(
        self,
        ref: PromptRef,
        task_id: int | None,
        pin: bool,
        *,
        is_operators: bool,
        canary_of: str | None = None,
    ) -> None:
        try:
            warmed = await self.warm(ref, task_id=task_id, pin=pin, is_operators=is_operators, canary_of=canary_of)
        except (PromptStoreError, ServerError) as error:
            logger.warning("%s cannot be %s: %s", ref, "pinned" if pin else "warmed", error)
        else:
            logger.info("%s is warm after %.3f s", _ref(ref.name, warmed.version.version), warmed.seconds)

    def _check_budget(
        self,
        version: PromptVersion,
        sources: _Sources,
        alias: str | None,
        payer: str | None,
    ) -> None:
        """Raise PinBudgetError if a pin may not be added. Pins that end because their alias moves make room."""
        pin = self._pins.get((version.name, version.version))
        held: _Sources = pin.sources if pin is not None else {}
        model = self._engine.model
        adding = {
            source.identity: pinned_bytes(source, model) for part, source in sources.items() if part not in held
        }
        stay = self._targets.get((version.name, str(alias)), set())
        left = [self._pins[version.name, other] for other in self.pinned_versions(version.name) if other not in stay]
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
        sources: _Sources,
        alias: str | None,
        lease: AsyncExitStack,
        payer: str | None,
    ) -> None:
        pin = self._pins.get((version.name, version.version))
        if pin is None:
            pin = self._pins[version.name, version.version] = _Pin(lease.pop_all(), payer, {}, set())
        pin.aliases.add(alias)
        for part, source in sources.items():
            # A second lease of the version has the same path.
            if part not in pin.sources:
                pin.sources[part] = source
                self._budget.add(pin.payer, source.identity, pinned_bytes(source, self._engine.model))
            self._engine.pin(source)
        await self._leave(version, {alias} - {None})

    async def _leave(self, version: PromptVersion, aliases: set[str | None]) -> None:
        """End the pins of other versions that exist for these aliases only, without their canaries."""
        for other in self.pinned_versions(version.name):
            held = self._pins.get((version.name, other))
            if held is None or other == version.version:
                continue
            left = {
                alias
                for alias in held.aliases & aliases
                if other not in self._targets.get((version.name, str(alias)), ())
            }
            if left:
                held.aliases -= left
                if not held.aliases:
                    await self._end(version.name, other)

    async def _end(self, name: str, version: int, task_id: int | None = None) -> None:
        pin = self._pins.get((name, version))
        if pin is None:
            return
        ended = [part for part in pin.sources if task_id in (None, part)]
        if pin.sources.keys() - ended == {_OVER}:  # the adapter stays as long as a task does
            ended.append(_OVER)
        for identity, source in [(pin.sources[part].identity, pin.sources.pop(part)) for part in ended]:
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
