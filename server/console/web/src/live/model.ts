// The running batch and the load, as the server describes them.
import type { components } from "../../generated/api";

type Schemas = components["schemas"];
export type Engine = Schemas["EngineBody"];
export type Row = Schemas["Row"];
export type Resident = Schemas["ResidentSoftPrompt"];
export type Blocks = Schemas["Blocks"];
export type Stats = Schemas["Stats"];
export type Point = Schemas["StatsPoint"];

/** Why a sequence waits, in words. */
export const REASONS: Record<string, string> = {
  place: "no free place in the batch",
  blocks: "no free blocks",
  soft_prompt: "its soft prompt is being read",
  adapter: "its adapter is being read",
  grammar: "its grammar is being compiled",
  preempted: "it made room for others",
};

/** The rows that share one soft prompt, whose bytes may have several names; `resident` is null for those without. */
export interface Group {
  key: string;
  names: string[];
  isMine: boolean;
  resident: Resident | null;
  rows: Row[];
}

/** The running rows by their soft prompt: the most used first, those without one last, then those of other tenants. */
export function groupsOf({ rows, soft_prompts }: Engine): Group[] {
  const groups = new Map<string, Group>();
  for (const row of rows) {
    if (row.phase === "waiting") continue;
    const key = row.mine ? String(row.soft_prompt ?? "base") : "other";
    const resident = row.mine && row.soft_prompt !== null ? (soft_prompts[row.soft_prompt] ?? null) : null;
    const group = groups.get(key) ?? { key, names: [], isMine: row.mine, resident, rows: [] };
    group.rows.push(row);
    if (row.mine && row.name !== null && !group.names.includes(row.name)) group.names.push(row.name);
    groups.set(key, group);
  }
  const rank = (group: Group) => (group.resident ? 0 : group.isMine ? 1 : 2);
  return [...groups.values()].sort((one, other) => rank(one) - rank(other) || other.rows.length - one.rows.length || one.key.localeCompare(other.key));
}

/** The names under which running and waiting sequences use a soft prompt on the device; the last one if none does. */
export function namesOf({ rows, soft_prompts }: Engine, index: number): string[] {
  const used = rows.filter((row) => row.mine && row.soft_prompt === index && row.name !== null).map((row) => row.name!);
  const last = soft_prompts[index]?.name;
  return used.length > 0 ? [...new Set(used)] : last ? [last] : [];
}

/** What a row is called. */
export const nameOf = (row: Row): string => (row.mine ? (row.name ?? "base") : "another tenant");

/** The name in NAME@VERSION, which has the colour; null for the base and for other tenants. */
export const colourName = (name: string | null): string | null => name?.split("@")[0] ?? null;

/** The blocks of a row after its soft prompt's: shared text, own text, generated. */
export function parts(row: Row, size: number): { shared: number; text: number; generated: number } {
  const generated = Math.min(Math.ceil(row.new_tokens / size), row.blocks.own);
  return { shared: row.blocks.shared, text: row.blocks.own - generated, generated };
}
