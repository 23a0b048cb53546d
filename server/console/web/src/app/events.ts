// The server-sent events of this tab: one stream, with the topics that the open page needs.
import { effect, signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { query } from "../api/client";
import { lacking, me } from "./session";

/** What a listener may hear of: the server's events, and `open` when a stream begins. */
export type EventName = "open" | "server" | "live" | "pool" | "stats" | "catalog" | "job";

/** The topics that the open page needs besides the catalog's changes. */
export const wanted = signal<string>("");

/** The replica of a cluster that the open page shows; empty for the one that answers. */
export const shownReplica = signal<string>("");

/** Whether the page is hidden; nothing is read meanwhile. */
const isHidden = signal(document.hidden);

type Listener = (data: unknown) => void;
const listeners = new Map<EventName, Set<Listener>>();
const NAMES = ["server", "live", "pool", "stats", "catalog", "job"] as const;
const RETRY_MS = 3000;

/** Call `listener` for each event of a name; returns a function that ends this. */
export function onEvent<T>(name: EventName, listener: (data: T) => void): () => void {
  const all = listeners.get(name) ?? new Set();
  listeners.set(name, all);
  all.add(listener as Listener);
  return () => all.delete(listener as Listener);
}

/** Call `reread` when a soft prompt has changed: the one of this name, or any without a name. */
export function useCatalog(reread: () => void, name?: string): void {
  const current = useRef(reread);
  current.current = reread;
  useEffect(() => onEvent<{ id: string | null }>("catalog", ({ id }) => (name === undefined || id === null || id === name) && current.current()), [name]);
}

function tell(name: EventName, data: unknown): void {
  listeners.get(name)?.forEach((listen) => listen(data));
}

function open(topics: string, replica: string): () => void {
  let retry: ReturnType<typeof setTimeout> | undefined;
  let source: EventSource;
  const connect = () => {
    source = new EventSource(`/v1/events${query({ topics, replica })}`);
    for (const name of NAMES) source.addEventListener(name, (event) => tell(name, JSON.parse((event as MessageEvent<string>).data)));
    source.onopen = () => {
      // What changed before is in none of its events, but may have changed after it was read: it is read again.
      tell("open", null);
      if (!lacking("prompts:read")) tell("catalog", { id: null });
    };
    source.onerror = () => {
      tell("server", null);
      // After a refusal the browser does not try again by itself.
      if (source.readyState === EventSource.CLOSED) retry = setTimeout(connect, RETRY_MS);
    };
  };
  connect();
  return () => {
    clearTimeout(retry);
    source.close();
  };
}

export function watchEvents(): void {
  document.addEventListener("visibilitychange", () => (isHidden.value = document.hidden));
  effect(() => {
    if (!me.value || isHidden.value) return undefined;
    const topics = [...(lacking("prompts:read") ? [] : ["catalog"]), ...wanted.value.split(",").filter(Boolean)];
    return topics.length > 0 ? open(topics.join(","), shownReplica.value) : undefined;
  });
}
