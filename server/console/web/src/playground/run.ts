// Asking a question, and collecting its answers as they come.
import { signal } from "@preact/signals";
import { ApiError, call } from "../api/client";
import { type Answer, type Candidate, type Question, requestsOf, type Token, type Usage } from "./model";
import { streamed } from "./stream";

export interface Classified {
  label: string;
  probabilities: Record<string, number>;
}

export interface Run {
  question: Question;
  answers: Answer[];
  labels: (Classified | ApiError | null)[];
  isRunning: boolean;
  error: ApiError | null;
  usage: Usage | null;
}

/** The last run; a new object at each change, at most one a frame. */
export const run = signal<Run | null>(null);

let abort: AbortController | null = null;

export function stop(): void {
  abort?.abort();
}

interface Choice {
  index: number;
  model?: string;
  text?: string;
  delta?: { content?: string | null };
  finish_reason?: string | null;
  logprobs?: CompletionLogprobs | ChatLogprobs | null;
  timings?: Answer["timings"];
  error?: { message: string };
}

interface CompletionLogprobs {
  tokens: string[];
  token_logprobs: (number | null)[];
  top_logprobs: (Record<string, number> | null)[] | null;
}

interface ChatLogprobs {
  content: { token: string; logprob: number; top_logprobs: { token: string; logprob: number }[] }[];
}

const sorted = (candidates: Candidate[]) => candidates.sort((one, other) => other.logprob - one.logprob);

/** The tokens of a chunk; its whole text stands with the first, if the tokens' texts are not the chunk's. */
function tokensOf(choice: Choice, step: number | null): Token[] {
  const text = choice.text ?? choice.delta?.content ?? "";
  const { logprobs } = choice;
  let found: Token[] = [];
  if (logprobs && "content" in logprobs)
    found = (logprobs.content ?? []).map((one) => ({
      text: one.token,
      logprob: one.logprob,
      step,
      candidates: sorted(one.top_logprobs.map((other) => ({ text: other.token, logprob: other.logprob }))),
    }));
  else if (logprobs)
    found = logprobs.tokens.map((token, index) => ({
      text: token,
      logprob: logprobs.token_logprobs[index] ?? null,
      step,
      candidates: sorted(Object.entries(logprobs.top_logprobs?.[index] ?? {}).map(([name, logprob]) => ({ text: name, logprob }))),
    }));
  if (found.length === 0) return text || step !== null ? [{ text, logprob: null, candidates: [], step }] : [];
  if (found.map((one) => one.text).join("") !== text) found = found.map((one, index) => ({ ...one, text: index === 0 ? text : "" }));
  return found;
}

function take(answers: Answer[], event: Record<string, unknown>): void {
  for (const choice of (event.choices ?? []) as Choice[]) {
    const answer = answers[choice.index];
    if (!answer) continue;
    if (choice.model) answer.model = choice.model;
    else if (answers.length === 1 && typeof event.model === "string") answer.model = event.model;
    answer.tokens.push(...tokensOf(choice, (event.step as number | undefined) ?? null));
    if (choice.finish_reason) answer.finish = choice.finish_reason;
    if (choice.error) answer.error = choice.error.message;
    if (choice.timings) answer.timings = choice.timings;
  }
}

/** Ask a question; a run that is still going on is stopped. */
export async function ask(question: Question): Promise<void> {
  abort?.abort();
  const mine = (abort = new AbortController());
  const answers = question.members.map((member): Answer => ({ member, model: null, tokens: [], finish: null, error: null, timings: null }));
  const state: Run = { question, answers, labels: question.members.map(() => null), isRunning: true, error: null, usage: null };
  let frame = 0;
  const show = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      if (abort === mine) run.value = { ...state, answers: answers.map((answer) => ({ ...answer })) };
    });
  };
  run.value = { ...state }; // at once: until then the answers of the last question would seem to be those of this one
  try {
    const requests = requestsOf(question);
    if (question.mode === "classify")
      await Promise.all(
        requests.map(async (request, index) => {
          state.labels[index] = await call<{ data: Classified[] }>("POST", request.path, request.body, mine.signal).then(
            ({ data }) => data[0]!,
            (error: unknown) => {
              if (error instanceof ApiError) return error;
              throw error;
            },
          );
          show();
        }),
      );
    else
      for await (const event of streamed(requests[0]!, mine.signal)) {
        take(answers, event);
        if (event.usage) state.usage = event.usage as Usage;
        show();
      }
  } catch (error) {
    if (!mine.signal.aborted) {
      if (!(error instanceof ApiError)) throw error;
      state.error = error;
    }
  } finally {
    state.isRunning = false;
    show();
  }
}
