"""Rollouts of aliases on either database: atomic changes, history, deletion, restoration, migration."""

from __future__ import annotations

import json

import pytest
import sqlalchemy as sa
from alembic import command

from prompt_store.catalog import database as module
from prompt_store.catalog import transfer, usage
from prompt_store.catalog.catalog import Catalog
from prompt_store.catalog.database import Database
from prompt_store.changes import HistoryAction
from prompt_store.errors import PromptConflictError, PromptInUseError, PromptNotFoundError
from prompt_store.rollouts import NO_ROLLOUT, Rollout, Shadow
from prompt_store.types import PromptRef
from tests.prompt_store.catalog.conftest import publish, resolve

CANARY = Rollout({2: 5.0}, Shadow(3, 10.0))


@pytest.fixture
def rolling(catalog: Catalog) -> Catalog:
    """``p@latest`` is version 1, with 2 as a canary and 3 as a shadow."""
    for content in "abc":
        publish(catalog, "p", content, alias=None)
    catalog.set_alias("p", "latest", 1, None, rollout=CANARY)
    return catalog


def rollout_of(catalog: Catalog, alias: str = "latest") -> Rollout:
    return catalog.look_up(PromptRef("p", alias=alias))[1]


def actions(catalog: Catalog) -> list[str]:
    """The changes of aliases, oldest first."""
    entries, _ = catalog.list_history("p", 100, None)
    return [entry.action.value for entry in entries if entry.alias is not None][::-1]


def test_an_alias_moves_and_starts_a_rollout_at_once(rolling: Catalog) -> None:
    version, rollout = rolling.look_up(PromptRef.parse("p"))
    assert (version.version, rollout) == (1, CANARY)
    assert rolling.get_prompt("p").rollouts == {"latest": CANARY}
    assert rolling.list_prompts(10, None, None)[0][0].rollouts == {"latest": CANARY}
    promote, rollout_entry = rolling.list_history("p", 2, None)[0][::-1]
    assert (promote.action, promote.version) == (HistoryAction.PROMOTE, 1)
    assert (rollout_entry.action, rollout_entry.version) == (HistoryAction.ROLLOUT, 1)
    assert rollout_entry.details == {"from": {}, "to": CANARY.to_json()}
    before = rolling.revision()
    rolling.set_alias("p", "latest", 1, 1, rollout=CANARY)
    assert rolling.revision() == before  # nothing has changed
    with pytest.raises(PromptConflictError):
        rolling.set_alias("p", "latest", 1, 2, rollout=Rollout({2: 50.0}))
    other = Rollout({2: 50.0})
    for expected in (NO_ROLLOUT, Rollout({2: 5.0}), Rollout({2: 6.0}, Shadow(3, 10.0))):
        with pytest.raises(PromptConflictError, match="which is not the expected rollout"):
            rolling.set_alias("p", "latest", 1, 1, rollout=other, expected_rollout=expected)
        with pytest.raises(PromptConflictError, match="which is not the expected rollout"):
            rolling.rollback("p", "latest", 1, expected_rollout=expected)
    with pytest.raises(PromptConflictError, match="has no rollout, which"):
        rolling.set_alias("p", "new", 1, None, rollout=other, expected_rollout=CANARY)
    assert rolling.revision() == before
    with pytest.raises(PromptNotFoundError, match="has no version 4"):
        rolling.set_alias("p", "latest", 1, None, rollout=Rollout({4: 5.0}))
    with pytest.raises(ValueError, match="is the alias's own"):
        rolling.set_alias("p", "latest", 2, None, rollout=Rollout({2: 5.0}))
    assert rollout_of(rolling) == CANARY
    assert resolve(rolling, "p@3") == 3
    assert rolling.look_up(PromptRef.parse("p@1"))[1] == NO_ROLLOUT


def test_a_promotion_and_an_upload_end_a_rollout(rolling: Catalog) -> None:
    rolling.set_alias("p", "latest", 2, None)
    assert (resolve(rolling, "p"), rollout_of(rolling)) == (2, NO_ROLLOUT)
    assert actions(rolling)[-2:] == ["promote", "rollout"]
    rolling.set_alias("p", "latest", 2, None, rollout=Rollout({1: 50.0}))
    rolling.set_alias("p", "latest", 2, None)  # the same version alone ends it too
    assert rollout_of(rolling) == NO_ROLLOUT
    rolling.set_alias("p", "latest", 2, None, rollout=Rollout({1: 50.0}))
    assert publish(rolling, "p", "d") == 4
    assert (resolve(rolling, "p"), rollout_of(rolling)) == (4, NO_ROLLOUT)


def test_a_rollback_ends_the_canaries_first(rolling: Catalog) -> None:
    rolling.set_alias("p", "latest", 2, None, rollout=Rollout({3: 5.0}))
    assert rolling.rollback("p", "latest", None) == 2
    assert rollout_of(rolling) == NO_ROLLOUT
    rolling.set_alias("p", "latest", 2, None, rollout=Rollout({}, Shadow(3, 5.0)))
    assert rolling.rollback("p", "latest", None) == 1  # a shadow answers nobody
    assert rollout_of(rolling) == NO_ROLLOUT
    with pytest.raises(PromptConflictError, match="there is no earlier version"):
        rolling.rollback("p", "latest", None)


@pytest.mark.parametrize("version", [2, 3])
def test_a_version_of_a_rollout_is_deleted_only_by_force(rolling: Catalog, version: int) -> None:
    with pytest.raises(PromptInUseError, match="is in the rollout of the alias latest"):
        rolling.delete_version("p", version)
    deleted = rolling.delete_version("p", version, force=True)
    assert (deleted.versions, deleted.aliases, deleted.ended_rollouts) == ((version,), {}, ("latest",))
    assert (resolve(rolling, "p"), rollout_of(rolling)) == (1, NO_ROLLOUT)
    assert rolling.restore("p", version, deleted_after=0).aliases == {}
    assert rollout_of(rolling) == NO_ROLLOUT  # it does not start again by itself


def test_a_restored_alias_has_its_rollout_again(rolling: Catalog) -> None:
    rolling.delete_prompt("p", force=True)
    assert rolling.restore("p", None, deleted_after=0).aliases == {"latest": 1}
    assert rollout_of(rolling) == CANARY
    rolling.delete_version("p", 1, force=True)
    rolling.delete_version("p", 2)
    assert rolling.restore("p", 1, deleted_after=0).aliases == {"latest": 1}
    assert rollout_of(rolling) == NO_ROLLOUT  # version 2 is not there


def test_prune_spares_the_versions_of_a_rollout(rolling: Catalog) -> None:
    for content in "de":
        publish(rolling, "p", content, alias=None)
    with rolling.changing(None) as change:
        assert usage.prune(change, "p", None, keep=1, before=2**62, spared=(), dry_run=False) == [4]


def test_an_import_brings_the_rollout_of_a_created_alias(rolling: Catalog) -> None:
    def imported(*, move: bool, alias: str = "stable", rollout: Rollout = CANARY) -> tuple[dict[str, int], list[str]]:
        with rolling.changing(None) as change:
            found = transfer.import_history(
                change, "p", [], {alias: 1}, None, move_aliases=move, rollouts={alias: rollout}
            )
        return dict(found.aliases), list(found.missing_rollouts)

    assert imported(move=False) == ({"stable": 1}, [])
    assert rollout_of(rolling, "stable") == CANARY
    rolling.set_alias("p", "stable", 1, None)
    assert imported(move=False) == ({}, [])
    assert rollout_of(rolling, "stable") == NO_ROLLOUT  # it was ended here
    assert imported(move=True) == ({}, [])
    assert rollout_of(rolling, "stable") == CANARY
    assert imported(move=False, alias="other", rollout=Rollout({9: 5.0})) == ({"other": 1}, ["other"])
    assert rollout_of(rolling, "other") == NO_ROLLOUT
    with pytest.raises(ValueError, match="is the alias's own"):
        imported(move=False, alias="wrong", rollout=Rollout({1: 5.0}))


def test_a_rollout_ends_when_a_release_without_rollouts_moves_the_alias(rolling: Catalog, url: str) -> None:
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg") if "post" in url else url)
    with engine.begin() as connection:  # what an older replica does
        connection.execute(sa.text("UPDATE aliases SET version = 3"))
    engine.dispose()
    assert (resolve(rolling, "p"), rollout_of(rolling)) == (3, NO_ROLLOUT)
    assert rolling.get_prompt("p").rollouts == {}
    rolling.set_alias("p", "latest", 1, None)
    assert rollout_of(rolling) == NO_ROLLOUT


def test_the_schema_is_migrated_up_and_down_with_data(url: str) -> None:
    catalog = Catalog(Database(url))
    for content in "abc":
        publish(catalog, "p", content)
    catalog.set_alias("p", "latest", 1, None, rollout=CANARY)
    catalog.close()
    database = Database(url)
    config = module._alembic()
    with database.writing() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0007")
    database.close()
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg") if "post" in url else url)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT version FROM aliases")).scalars().all() == [1]
        known = connection.execute(sa.text("SELECT action FROM history")).scalars().all()
        assert set(known) == {"publish", "promote"}
    engine.dispose()
    catalog = Catalog(Database(url))
    assert (resolve(catalog, "p"), rollout_of(catalog)) == (1, NO_ROLLOUT)
    catalog.set_alias("p", "latest", 1, None, rollout=CANARY)
    assert rollout_of(catalog) == CANARY
    with catalog.reading() as connection:
        stored = connection.execute(sa.text("SELECT rollout FROM aliases")).scalar_one()
    assert json.loads(stored) == {"of": 1, "rollout": CANARY.to_json()}
    catalog.close()
