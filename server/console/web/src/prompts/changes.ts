// Changes of soft prompts in words.
import type { Change, Rollout } from "../api/types";
import { decimals } from "../ui/format";

/** How an alias shares its requests, in words; empty if its own version answers all. */
export function rolloutText({ canaries = {}, shadow }: Rollout): string {
  const shares = Object.entries(canaries).map(([version, percent]) => `version ${version} answers ${decimals(percent)}% of its requests`);
  if (shadow) shares.push(`version ${shadow.version} gets copies of ${decimals(shadow.percent)}% of them`);
  return shares.join(", ");
}

function rolloutChange({ alias, details }: Change): string {
  const [before, after] = ["from", "to"].map((key) => rolloutText((details[key] ?? {}) as Rollout));
  if (!after) return `ended the rollout of ${alias}`;
  return `${before ? "changed" : "started"} the rollout of ${alias}: ${after}`;
}

const ACTIONS: Record<Change["action"], (change: Change) => string> = {
  publish: (change) => `published version ${change.version}`,
  promote: (change) => `moved ${change.alias} ${change.previous_version === null ? "" : `from ${change.previous_version} `}to ${change.version}`,
  rollback: (change) => `rolled ${change.alias} back from ${change.previous_version} to ${change.version}`,
  rollout: rolloutChange,
  delete_alias: (change) => `deleted the alias ${change.alias}`,
  delete_version: (change) => `deleted version ${change.version}`,
  delete_prompt: () => "deleted the soft prompt",
  restore: (change) => `restored ${change.version === null ? "it" : `version ${change.version}`}`,
  edit: (change) => `edited ${change.version === null ? "it" : `version ${change.version}`}`,
  import: (change) => `imported ${change.version === null ? "it" : `version ${change.version}`}`,
  change_owner: () => "gave it another owner",
  read_across_tenants: () => "read what belongs to another tenant",
};

/** The kinds of changes, in the order of the filter. */
export const ALL_ACTIONS = Object.keys(ACTIONS);

/** A change in words. */
export function changeText(change: Change): string {
  return ACTIONS[change.action]?.(change) ?? String(change.action).replaceAll("_", " ");
}

/** The key that made a change: its name, or the beginning of its digest; empty without keys. */
export function actorOf(change: Change): string {
  return change.actor_name ?? change.actor ?? "";
}
