// The state of the server, read every few seconds while the page is visible, more often while something is wrong.
import { effect, signal } from "@preact/signals";
import { ApiError, call, isReachable } from "../api/client";
import type { ServerState } from "../api/types";
import { onEvent } from "./events";
import { me } from "./session";

export const server = signal<ServerState | null>(null);

/** Incremented when the server is back after it did not answer or did not serve, or its catalog was away: pages read again. */
export const returns = signal(0);

const STEADY_MS = 5000;
const TROUBLED_MS = 1000;

let timer: ReturnType<typeof setTimeout> | undefined;

async function poll(): Promise<void> {
  clearTimeout(timer);
  if (document.hidden || me.value === null) return;
  const before = server.value;
  const wasDown = !isReachable.value || (before !== null && !(isServing() && before.store.is_available));
  try {
    server.value = await call<ServerState>("GET", "/v1/server");
    if (wasDown && isServing() && server.value.store.is_available) returns.value += 1;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
  }
  timer = setTimeout(poll, isServing() ? STEADY_MS : TROUBLED_MS);
}

/** Whether the server answers and serves the model. */
export function isServing(): boolean {
  return isReachable.value && server.value?.phase === "serving";
}

export function watchServer(): void {
  // Sent when the phase changes, and when the stream breaks off; between them the state is read now and then.
  onEvent("server", () => void poll());
  document.addEventListener("visibilitychange", poll);
  let wasReachable = true;
  effect(() => {
    if (wasReachable && !isReachable.value) poll();
    wasReachable = isReachable.value;
  });
  effect(() => {
    if (me.value !== undefined) poll();
  });
}
