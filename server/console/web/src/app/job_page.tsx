// A page of evaluations or training runs: the list, newest first, with the chosen one beside it.
import type { ComponentChildren } from "preact";
import { useEffect, useState } from "preact/hooks";
import { useLoad } from "../ui/load";
import { Button, Card, Chip, ErrorNote, Loading, Swatch } from "../ui/parts";
import { onEvent } from "./events";
import { type Job, merged, useJobs } from "./jobs";

/** The number of entries that are read at once. */
export const PAGE_SIZE = 50;

interface Page<T> {
  data: T[];
  has_more: boolean;
  last_id?: string | null;
}

export interface JobList<T> {
  jobs: T[];
  /** What was heard of each since the page was opened. */
  changed: Map<string, T>;
  isRead: boolean;
  error: ReturnType<typeof useLoad>["error"];
  reload: () => void;
  /** Read the next page; undefined if there is none. */
  more: (() => void) | undefined;
}

/** Read a list a page at a time, from the beginning for another `key`, and follow its changes. */
export function useJobList<T extends Job>(object: string, key: string, read: (after: string | null, signal?: AbortSignal) => Promise<Page<T>>): JobList<T> {
  const [older, setOlder] = useState<{ key: string; pages: Page<T>[] }>({ key, pages: [] });
  const changed = useJobs<T>(object);
  const { data, error, reload } = useLoad(key, (signal) => read(null, signal));
  useEffect(() => onEvent("open", reload), []);
  const pages = [...(data ? [data] : []), ...(older.key === key ? older.pages : [])];
  const last = pages.at(-1);
  const jobs = merged(
    pages.flatMap((page) => page.data),
    changed,
  );
  const more = last?.has_more ? () => void read(last.last_id ?? null).then((page) => setOlder({ key, pages: [...pages.slice(1), page] })) : undefined;
  return { jobs, changed, isRead: data !== undefined, error, reload, more };
}

/** One entry of the list in words. */
export interface Line {
  href: string;
  prompt: string | null;
  name: string;
  state: string;
  stateKind: string;
  text: ComponentChildren;
}

interface Props<T> {
  list: JobList<T>;
  title: string;
  /** What stands beside the title. */
  side?: ComponentChildren;
  /** What is shown instead of an empty list. */
  empty: ComponentChildren;
  chosen: string | undefined;
  lineOf: (job: T) => Line;
  /** The chosen one, or what to do if none is. */
  children: ComponentChildren;
}

export function JobPage<T extends Job>({ list: { jobs, isRead, error, reload, more }, title, side, empty, chosen, lineOf, children }: Props<T>) {
  return (
    <>
      <div class="title">
        <h1>{title}</h1>
        {side}
      </div>
      {error && <ErrorNote error={error} retry={reload} />}
      {!isRead && !error && <Loading />}
      {isRead && jobs.length === 0 && empty}
      {jobs.length > 0 && (
        <div class="cols evaluations">
          <Card title="All">
            <ul class="lines picks">
              {jobs.map((job) => (
                <li key={job.id}>
                  <Pick line={lineOf(job)} isChosen={job.id === chosen} />
                </li>
              ))}
            </ul>
            {more && (
              <div class="pad">
                <Button onClick={more}>Show older ones</Button>
              </div>
            )}
          </Card>
          {children}
        </div>
      )}
    </>
  );
}

function Pick({ line, isChosen }: { line: Line; isChosen: boolean }) {
  return (
    <a href={line.href} aria-current={isChosen ? "page" : undefined}>
      <span class="row">
        <Swatch name={line.prompt} />
        <b class="any grow">{line.name}</b>
        <Chip kind={line.stateKind}>{line.state}</Chip>
      </span>
      <small class="dim3">{line.text}</small>
    </a>
  );
}
