// Evaluations and training runs as they change: events of the topic "jobs".
import { useEffect, useRef, useState } from "preact/hooks";
import { onEvent, wanted } from "./events";
import { me } from "./session";

export interface Job {
  object: string;
  id: string;
}

/** Whether the key has one of these scopes. */
export function hasAny(...scopes: string[]): boolean {
  return scopes.some((scope) => me.value?.scopes.some((one) => one === scope));
}

/** The newest state of each job of a kind that has changed since the page was opened; `onChange` hears of each. */
export function useJobs<T extends Job>(object: string, onChange?: (job: T) => void): Map<string, T> {
  const [changed, setChanged] = useState<Map<string, T>>(new Map());
  const listener = useRef(onChange);
  listener.current = onChange;
  const canWatch = hasAny("generate", "prompts:read");
  useEffect(() => {
    if (!canWatch) return undefined;
    wanted.value = "jobs";
    const end = onEvent<T>("job", (job) => {
      if (job.object !== object) return;
      setChanged((before) => new Map(before).set(job.id, job));
      listener.current?.(job);
    });
    return () => {
      wanted.value = "";
      end();
    };
  }, [object, canWatch]);
  return changed;
}

/** Jobs that were read, in the state that was heard last, with new ones before them. */
export function merged<T extends Job>(read: T[], changed: Map<string, T>): T[] {
  const known = new Set(read.map((job) => job.id));
  return [...[...changed.values()].filter((job) => !known.has(job.id)).toReversed(), ...read.map((job) => changed.get(job.id) ?? job)];
}
