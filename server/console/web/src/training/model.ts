// Training runs in words.
import type { Run } from "../api/types";
import { decimals, percent } from "../ui/format";

export interface Golden {
  is_passed?: boolean;
  largest_difference?: number;
  tolerance?: number;
  texts?: number;
  tokens?: number;
}

export interface StageScores {
  loss?: number;
  accuracy?: number;
}

export const methodName = (run: Run): string => run.method.replaceAll("_", " ");

export function stateText(run: Run): string {
  if (run.is_silent) return "silent";
  if (run.status !== "running" || !run.num_steps) return run.status;
  return `${percent(run.step / run.num_steps)} done`;
}

export function stateKind(run: Run): string {
  if (run.status === "failed") return "bad";
  return run.status === "completed" ? "ok" : "warn";
}

/** The golden check in words: whether the server computes what PEFT does. */
export function goldenText({ is_passed, largest_difference, tolerance }: Golden): string {
  const difference = largest_difference === undefined ? "" : `: the largest difference from PEFT is ${decimals(largest_difference, 6)} nats${tolerance === undefined ? "" : `, of at most ${decimals(tolerance, 6)}`}`;
  return `Golden check ${is_passed ? "passed" : "failed"}${difference}`;
}

export const goldenOf = (run: Run): Golden | null => run.golden_check as Golden | null;

/** The scores by stage, such as untrained and trained, in the order in which they were reported. */
export const stagesOf = (run: Run): [string, StageScores][] =>
  Object.entries((run.scores ?? {}) as Record<string, StageScores | null>).flatMap(([stage, scores]): [string, StageScores][] => (scores ? [[stage, scores]] : []));

/** A setting as text. */
export const settingText = (value: unknown): string => (typeof value === "string" ? JSON.stringify(value).slice(1, -1) : typeof value === "number" ? decimals(value, 6) : JSON.stringify(value));
