// Evaluations in words.
import type { Evaluation } from "../api/types";
import { count, percent, plural } from "../ui/format";

export const isOver = ({ status }: Evaluation): boolean => ["completed", "failed", "cancelled"].includes(status);

/** The score, or what there is instead of one. */
export function scoreText(one: Evaluation): string {
  if (one.scores) return percent(one.scores.accuracy, 1);
  if (one.status === "in_progress") return `${percent(one.rows.answered / Math.max(one.rows.total, 1))} done`;
  return one.status.replace("_", " ");
}

export function scoreKind(one: Evaluation): string {
  if (one.status === "failed") return "bad";
  return one.status === "completed" ? "" : "warn";
}

/** What was asked, and how: a text prompt makes another model of the base. */
export const titleOf = (one: Evaluation): string => one.model + (one.settings.text_prompt ? " with a text prompt" : "");

export const dataText = (one: Evaluation): string => `${one.dataset || "unnamed data"}, ${plural(one.rows.total, "row")}`;

export const metricText = ({ metric }: Evaluation): string => metric.replace("_", " ");

/** A difference of two shares in points, with its sign. */
export function points(difference: number): string {
  const value = (100 * difference).toFixed(1);
  return difference > 0 ? `+${value}` : value.replace("-", "−");
}

/** Whether a difference is more than chance, in words. */
export function verdict(first: string, difference: number, pValue: number): string {
  if (difference === 0) return "The two answer equally many rows correctly.";
  const better = difference > 0 ? "more" : "fewer";
  const sure = pValue < 0.05 ? "which is unlikely to be chance" : "which may be chance";
  return `${first} answers ${better} rows correctly, ${sure} (McNemar's exact test: p = ${pValue < 0.001 ? pValue.toExponential(1) : pValue.toFixed(3)}).`;
}

export const rowsText = (one: Evaluation): string =>
  `${count(one.rows.right)} of ${count(one.rows.total)} right${one.rows.errors > 0 ? `, ${plural(one.rows.errors, "row")} without an answer` : ""}`;
