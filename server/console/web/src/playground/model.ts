// What the playground asks, and what it was answered.

export type Mode = "complete" | "chat" | "classify" | "score";

export const MODES: [Mode, string][] = [
  ["complete", "Complete"],
  ["chat", "Chat"],
  ["classify", "Classify"],
  ["score", "Score a text"],
];

/** Members of one request, at most. */
export const MAX_MEMBERS = 8;

export interface Candidate {
  text: string;
  logprob: number;
}

/** One token of an answer; `step` is the engine's step that gave it. */
export interface Token {
  text: string;
  logprob: number | null;
  candidates: Candidate[];
  step: number | null;
}

/** Seconds, and numbers of the engine's steps. */
export interface Timings {
  queue_seconds: number | null;
  prefill_seconds: number | null;
  first_token_seconds: number | null;
  decode_seconds: number;
  first_step: number | null;
  last_step: number | null;
}

/** Token counts of a whole request. */
export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  prompt_tokens_details: { cached_tokens: number; virtual_tokens: number };
}

export interface Answer {
  /** As it was asked for. */
  member: string;
  /** NAME@VERSION that answered; null until it is known. */
  model: string | null;
  tokens: Token[];
  finish: string | null;
  error: string | null;
  timings: Timings | null;
}

export interface Knobs {
  temperature: string;
  max_tokens: string;
  top_p: string;
  seed: string;
  stop: string;
  logprobs: string;
}

export const KNOBS: [keyof Knobs, string][] = [
  ["temperature", "0 takes the most likely token"],
  ["max_tokens", "new tokens at most"],
  ["top_p", "share of the probability to draw from"],
  ["seed", "for the same draw again"],
  ["stop", "ends the answer; \\n is a line break"],
  ["logprobs", "candidates per token, 0 to 20"],
];

export const FIRST_KNOBS: Knobs = { temperature: "0", max_tokens: "64", top_p: "", seed: "", stop: "", logprobs: "5" };

export interface Question {
  mode: Mode;
  text: string;
  system: string;
  labels: string;
  members: string[];
  knobs: Knobs;
}

export interface Request {
  path: string;
  body: Record<string, unknown>;
}

const unescaped = (text: string) => text.replaceAll("\\n", "\n").replaceAll("\\t", "\t");
const number = (text: string) => (text.trim() === "" ? undefined : Number(text));

/** The labels of a text field, one a line. */
export const labelsOf = (text: string): string[] => text.split("\n").filter(Boolean).map(unescaped);

function sampling(knobs: Knobs): Record<string, unknown> {
  const found = {
    temperature: number(knobs.temperature),
    max_tokens: number(knobs.max_tokens),
    top_p: number(knobs.top_p),
    seed: number(knobs.seed),
    stop: knobs.stop ? unescaped(knobs.stop) : undefined,
  };
  return Object.fromEntries(Object.entries(found).filter(([, value]) => value !== undefined));
}

/** The requests that answer a question: one, or one a member where the API takes no list. */
export function requestsOf(question: Question): Request[] {
  const { mode, text, system, labels, members, knobs } = question;
  const models = members.length === 1 ? members[0] : members;
  const each = members.length === 1 ? {} : { ensemble: "each" };
  const many = number(knobs.logprobs) ?? 0;
  if (mode === "classify") {
    const given = labelsOf(labels);
    return members.map((model) => ({ path: "/v1/classify", body: { model, input: text, ...(given.length > 0 ? { labels: given } : {}) } }));
  }
  if (mode === "chat") {
    const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: text }];
    return [{ path: "/v1/chat/completions", body: { model: models, ...each, messages, ...sampling(knobs), logprobs: true, top_logprobs: many } }];
  }
  const settings = mode === "score" ? { max_tokens: 0, echo: true } : sampling(knobs);
  return [{ path: "/v1/completions", body: { model: models, ...each, prompt: text, ...settings, logprobs: many } }];
}

/** Why a question cannot be asked; undefined if it can. */
export function faultOf({ text, members, knobs, mode }: Question): string | undefined {
  if (members.length === 0) return "Add a soft prompt or the base model first.";
  if (!text) return "The text is empty.";
  if (mode === "score" || mode === "classify") return undefined;
  const bad = KNOBS.find(([name]) => name !== "stop" && Number.isNaN(number(knobs[name]) ?? 0));
  return bad && `${bad[0]} is not a number.`;
}

/** The sum of the log-probabilities of an answer's tokens, and their number. */
export function total(tokens: Token[]): { logprob: number; count: number } {
  const known = tokens.filter((token) => token.logprob !== null);
  return { logprob: known.reduce((sum, token) => sum + token.logprob!, 0), count: known.length };
}
