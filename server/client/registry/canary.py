"""``prelude canary``: send a part of an alias's requests to another version, and promote it or end that by a rule."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from prompt_store.types import DEFAULT_ALIAS
from server.client.commands import (
    DEFAULT_URL,
    EXIT_CODES,
    Alias,
    ApiKey,
    ExitStatus,
    Json,
    Name,
    Reason,
    Url,
    answer,
    checked,
    serving,
)
from server.client.evaluation.command import compare_models, data_errors, why_not_better
from server.client.evaluation.evaluator import AnswerOptions
from server.client.http import ClientError, PreludeClient
from server.client.registry.times import parse_duration
from server.evaluation.examples import DEFAULT_MAX_TOKENS

app = typer.Typer(add_completion=False)

PAUSE_SECONDS = 5.0
"""Interval of looking at the counts."""

_MAX_VERSIONS = 1000
_ERRORS = re.compile(r"errors\s*<=\s*(\d+(?:\.\d+)?)\s*%")
_BETTER = "better"


@dataclass(frozen=True, slots=True)
class _Rules:
    """When the canary is promoted.

    Attributes:
        max_errors: Maximum share of failed requests, 0 to 1; None for no rule.
        is_better: Whether it must score higher on labelled examples.
    """

    max_errors: float | None
    is_better: bool

    @classmethod
    def parse(cls, rules: list[str]) -> _Rules:
        errors = [found for found in map(_ERRORS.fullmatch, rules) if found]
        unknown = [rule for rule in rules if rule != _BETTER and not _ERRORS.fullmatch(rule)]
        if unknown or len(errors) > 1 or any(float(one[1]) > 100 for one in errors):
            raise typer.BadParameter("--promote-if is better, or errors<=PERCENT%, such as errors<=1%; each once")
        return cls(float(errors[0][1]) / 100 if errors else None, _BETTER in rules)


@dataclass(slots=True)
class _Rollout:
    """One run of the command.

    Attributes:
        stable: The version that the alias points at.
        seen: The rollout that the alias had when it was last read or set; a change of it fails if it has another one.
    """

    client: PreludeClient
    name: str
    alias: str
    stable: int
    seen: Mapping[str, Any]
    to: int
    reason: str | None

    def start(self, percent: float, *, is_shadow: bool) -> dict[str, Any]:
        """Start it, or end it at 0 percent."""
        rollout: dict[str, Any] = {}
        if percent:
            share = {"shadow": {"version": self.to, "percent": percent}}
            rollout = share if is_shadow else {"canaries": {str(self.to): percent}}
        return self._set(self.stable, rollout)

    def end(self, *, promote: bool) -> dict[str, Any]:
        """Promote the canary, or leave all requests to the stable version."""
        return self._set(self.to if promote else self.stable, {})

    def _set(self, version: int, rollout: Mapping[str, Any]) -> dict[str, Any]:
        reply = self.client.set_alias(
            self.name,
            self.alias,
            version,
            expected=self.stable,
            reason=self.reason,
            rollout=rollout,
            expected_rollout=self.seen,
        )
        self.seen = rollout
        return reply

    def check_unchanged(self) -> None:
        """Raise ClientError if somebody else has moved the alias or changed its rollout."""
        prompt = self.client.prompt(self.name)
        canaries = (prompt["rollouts"].get(self.alias) or {}).get("canaries") or {}
        if prompt["aliases"].get(self.alias) != self.stable or str(self.to) not in canaries:
            raise ClientError(
                f"{self.name}@{self.alias} was changed meanwhile; this command changes nothing more",
                status=409,
                code="conflict",
            )

    def counts(self) -> tuple[int, int]:
        """Requests and failed requests of the canary, on all servers of the catalog."""
        data = self.client.usage(self.name, limit=_MAX_VERSIONS)["data"]
        return next(((one["requests"], one["errors"]) for one in data if one["version"] == self.to), (0, 0))


@app.command("canary", epilog=EXIT_CODES)
def canary(
    name: Name,
    to: Annotated[int, typer.Option("--to", metavar="V", min=1, help="Version that gets a part of the requests.")],
    percent: Annotated[
        float, typer.Option(min=0, max=100, help="Percent of the requests; 0 ends the rollout.")
    ] = 5.0,
    alias: Alias = DEFAULT_ALIAS,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Only copy them: compare the answers, and return none.")
    ] = False,
    promote_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE",
            help="Wait, then promote if it holds or end the rollout: errors<=1%, or better (on --data); repeatable.",
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of the canary before `errors` is decided.")] = 100,
    within: Annotated[
        str, typer.Option("--for", metavar="TIME", help="Time for these requests; then the rollout ends.")
    ] = "1h",
    data: Annotated[Path | None, typer.Option(help="Labelled examples for `better`.")] = None,
    significant: Annotated[
        float | None, typer.Option(metavar="P", min=0.0, max=1.0, help="And McNemar's p-value must be below this.")
    ] = None,
    reason: Reason = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Send a part of an alias's requests to another version, and promote it or end that by a rule."""
    checked(name, "name")
    checked(alias, "alias")
    rules, seconds = _Rules.parse(promote_if or []), parse_duration(within)
    if rules.is_better != (data is not None):
        raise typer.BadParameter("--promote-if better and --data must be given together")
    if significant is not None and data is None:
        raise typer.BadParameter("--significant needs --promote-if better and --data")
    if promote_if and (shadow or not percent):
        raise typer.BadParameter("--promote-if needs a canary: no --shadow, and a --percent above 0")
    with data_errors(as_json=as_json), serving(url, api_key, as_json=as_json) as client:
        stable, seen = _stable(client, name, alias)
        rollout = _Rollout(client, name, alias, stable, seen, to, reason)
        reply = rollout.start(percent, is_shadow=shadow)
        if not promote_if:
            what = f"version {stable} answers all of {name}@{alias}"
            if percent:
                what = f"version {to} {'gets copies' if shadow else 'answers'} {percent:g}% of {name}@{alias}"
            answer(reply, as_json, what)
            return
        before = rollout.counts()
        why_not = None
        if data is not None:
            options = AnswerOptions(max_tokens=DEFAULT_MAX_TOKENS)
            names = (f"{name}@{to}", f"{name}@{stable}")
            report = compare_models(client, names, data, options, None, url, api_key)
            why_not = None if report is None else why_not_better(report, significant)
        if why_not is None and rules.max_errors is not None:
            why_not = _wait(rollout, before, rules.max_errors, requests, seconds)
        rollout.check_unchanged()
        reply = rollout.end(promote=why_not is None)
    result = {**reply, "promoted": why_not is None, "why_not": why_not}
    done = f"{name}@{alias} is version {reply['version']}"
    answer(result, as_json, done if why_not is None else f"{done} again: {why_not}")
    if why_not is not None:
        raise typer.Exit(ExitStatus.FAILED)


def _stable(client: PreludeClient, name: str, alias: str) -> tuple[int, Mapping[str, Any]]:
    """The version and the rollout of an alias."""
    prompt = client.prompt(name)
    version = prompt["aliases"].get(alias)
    if version is None:
        raise ClientError(f"the soft prompt {name!r} has no alias {alias!r}", status=404, code="prompt_not_found")
    return int(version), prompt["rollouts"].get(alias) or {}


def _wait(rollout: _Rollout, before: tuple[int, int], max_errors: float, requests: int, seconds: float) -> str | None:
    """Wait for the requests; why the canary is not promoted, None if it is."""
    deadline = time.monotonic() + seconds
    while True:
        count, errors = (now - then for now, then in zip(rollout.counts(), before, strict=True))
        if errors > max_errors * max(count, requests):
            return f"{errors} of {count} requests to version {rollout.to} failed, more than {100 * max_errors:g}%"
        if count >= requests:
            return None
        if time.monotonic() >= deadline:
            return f"version {rollout.to} got {count} requests in time, fewer than {requests}"
        rollout.check_unchanged()
        time.sleep(min(PAUSE_SECONDS, max(0.0, deadline - time.monotonic())))
