// All soft prompts and adapters, a page at a time.
import { useEffect, useRef, useState } from "preact/hooks";
import { ApiError, call, query } from "../api/client";
import type { Prompt, PromptPage as Page } from "../api/types";
import { useCatalog } from "../app/events";
import { href, route, setParams } from "../app/router";
import { returns } from "../app/server";
import { ago, bytes, count, date, decimals, duration, method } from "../ui/format";
import { Button, Chip, Empty, ErrorNote, Loading, Segments, Swatch } from "../ui/parts";
import { Tiers } from "./residency";

const PAGE_SIZE = 100;
const WAIT_MS = 150;

type Kind = "" | "soft_prompt" | "adapter";

const SORTS: [string, string][] = [["", "name"], ["used", "last use"], ["updated", "newest version"], ["created", "first version"]];

interface Listed {
  filter: string;
  rows: Prompt[];
  next: string | null;
  error: ApiError | null;
  isLoading: boolean;
}

/** Read pages of the list: one page for other filters, as many rows as before if it is read again. What was there stays until then. */
function useList(filters: Record<string, string>): Listed & { more: () => void; reload: () => void } {
  const [turn, setTurn] = useState(0);
  const filter = JSON.stringify(filters);
  const [state, setState] = useState<Listed>({ filter: "", rows: [], next: null, error: null, isLoading: true });
  const current = useRef<AbortController | null>(null);

  async function read(after: string | null, least = 0) {
    current.current?.abort();
    const abort = (current.current = new AbortController());
    setState((before) => ({ ...before, isLoading: true }));
    try {
      const rows: Prompt[] = [];
      let next = after;
      do {
        const page = await call<Page>("GET", `/v1/prompts${query({ limit: PAGE_SIZE, ...filters, after: next })}&include=usage&include=residency`, undefined, abort.signal);
        rows.push(...page.data);
        next = page.has_more ? page.last_id : null;
      } while (next !== null && rows.length < least);
      setState((before) => ({
        filter,
        rows: after === null ? rows : [...before.rows, ...rows],
        next,
        error: null,
        isLoading: false,
      }));
    } catch (error) {
      if (abort.signal.aborted) return;
      if (!(error instanceof ApiError)) throw error;
      setState((before) => ({ ...before, filter, error, isLoading: false }));
    }
  }

  useEffect(() => {
    const least = state.filter === filter ? state.rows.length : 0;
    const timer = setTimeout(() => void read(null, least), state.filter === "" ? 0 : WAIT_MS);
    return () => clearTimeout(timer);
  }, [filter, turn, returns.value]);
  useEffect(() => () => current.current?.abort(), []);
  return { ...state, more: () => void (state.next && !state.isLoading && read(state.next)), reload: () => setTurn((n) => n + 1) };
}

export function PromptList() {
  const { params } = route.value;
  const [q, tag, sort] = ["q", "tag", "sort"].map((name) => params.get(name) ?? "");
  const kind = (params.get("kind") ?? "") as Kind;
  const list = useList({ q: q!.trim(), tag: tag!, kind, sort: sort! });
  useCatalog(list.reload);
  const { rows } = list;
  const isFiltered = Boolean(q || tag || kind);
  return (
    <>
      <div class="title">
        <h1>Prompts</h1>
        <span class="grow" />
        <UploadLink />
      </div>
      <section class="card prompts" aria-label="Soft prompts">
        <div class="toolbar pad">
          <input type="search" aria-label="Search" placeholder="Name, tag or description" maxLength={200} value={q} onInput={(event) => setParams({ q: event.currentTarget.value })} />
          <Segments
            label="Kind"
            value={kind}
            options={[["", "All"], ["soft_prompt", "Soft prompts"], ["adapter", "Adapters"]]}
            onChange={(value) => setParams({ kind: value })}
          />
          <label class="row">
            <span class="dim3">by</span>
            <select aria-label="Order" value={sort} onChange={(event) => setParams({ sort: event.currentTarget.value })}>
              {SORTS.map(([value, text]) => (
                <option key={value} value={value}>
                  {text}
                </option>
              ))}
            </select>
          </label>
          {tag && (
            <Button small icon="close" label={`Without the tag ${tag}`} onClick={() => setParams({ tag: null })}>
              {tag}
            </Button>
          )}
          <span class="grow" />
          <span class="dim3 num" role="status">
            {list.isLoading ? "Loading …" : `${rows.length}${list.next ? "+" : ""} shown`}
          </span>
        </div>
        {list.error && <ErrorNote error={list.error} retry={list.reload} />}
        {rows.length > 0 && <Rows rows={rows} />}
        {rows.length === 0 && !list.next && !list.error && (list.isLoading ? <Loading /> : isFiltered ? <NothingFound /> : <NoPrompts />)}
        {list.next && <More onReach={list.more} isLoading={list.isLoading} />}
      </section>
    </>
  );
}

function UploadLink() {
  return (
    <Button icon="upload" kind="primary" needs="prompts:write" onClick={() => (location.hash = href(["upload"]))}>
      Upload
    </Button>
  );
}

function NothingFound() {
  return (
    <Empty title="No soft prompt fits these filters.">
      <Button onClick={() => setParams({ q: null, tag: null, kind: null })}>Show all</Button>
    </Empty>
  );
}

function NoPrompts() {
  return (
    <Empty title="There is no soft prompt yet.">
      <p>Upload the folder that PEFT has saved, or train one:</p>
      <pre>{"prelude push DIRECTORY --id NAME\nprelude train --data ROWS.jsonl --id NAME --push"}</pre>
      <UploadLink />
    </Empty>
  );
}

/** The end of the list: reaching it reads the next page. */
function More({ onReach, isLoading }: { onReach: () => void; isLoading: boolean }) {
  const element = useRef<HTMLDivElement>(null);
  const reach = useRef(onReach);
  reach.current = onReach;
  useEffect(() => {
    const observer = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && reach.current(), { rootMargin: "600px" });
    observer.observe(element.current!);
    return () => observer.disconnect();
  }, [isLoading]);
  return (
    <div ref={element} class="pad row">
      <Button onClick={onReach} blocked={isLoading ? "Loading …" : undefined}>
        Show more
      </Button>
    </div>
  );
}

/** The first score of a version: its name and value. */
function scoreOf(prompt: Prompt): [string, number] | undefined {
  const scores = prompt.latest.lineage.scores;
  const found = scores && typeof scores === "object" ? Object.entries(scores as Record<string, unknown>) : [];
  return found.find((entry): entry is [string, number] => typeof entry[1] === "number");
}

function Rows({ rows }: { rows: Prompt[] }) {
  return (
    <table>
      <thead>
        <tr>
          <th scope="col">Name</th>
          <th scope="col" class="mid">Method</th>
          <th scope="col">Aliases</th>
          <th scope="col" class="wide">Score</th>
          <th scope="col" class="wide">Owner</th>
          <th scope="col" class="right wide">Requests</th>
          <th scope="col" class="right wide">
            <abbr title="95% of the requests of the last hour to this server took at most this long, from their arrival to the end of the answer">p95</abbr>
          </th>
          <th scope="col" class="wide">Where</th>
          <th scope="col" class="right wide">Size</th>
          <th scope="col" class="right wide">Published</th>
        </tr>
      </thead>
      <tbody>
        {rows.map((prompt) => (
          <Row key={prompt.id} prompt={prompt} />
        ))}
      </tbody>
    </table>
  );
}

function Row({ prompt }: { prompt: Prompt }) {
  const { latest } = prompt;
  const score = scoreOf(prompt);
  return (
    <tr>
      <td>
        <div class="name">
          <Swatch name={prompt.id} />
          <a href={href(["prompts", prompt.id])}>{prompt.id}</a>
          {latest.description && <small class="cut">{latest.description}</small>}
        </div>
      </td>
      <td class="mid dim">
        {method(latest.peft_type)}
        <span class="dim3 nowrap"> · {latest.kind === "adapter" ? `rank ${latest.rank}` : `${latest.num_virtual_tokens} tok`}</span>
      </td>
      <td>
        <span class="row">
          {Object.entries(prompt.aliases).map(([alias, version]) => (
            <Chip key={alias} kind={alias === "latest" ? "alias" : ""}>
              {`${alias}\u00a0→\u00a0${version}`}
            </Chip>
          ))}
          {latest.tags.map((tag) => (
            <a key={tag} class="chip" href={href(["prompts"], { tag })}>
              {tag}
            </a>
          ))}
        </span>
      </td>
      <td class="wide num">
        {score && (
          <span title={score[0]}>
            {score[1] >= 0 && score[1] <= 1 && <Meter share={score[1]} />}
            {decimals(score[1])}
          </span>
        )}
      </td>
      <td class="wide dim">{latest.shared ? "all tenants" : latest.owner}</td>
      <td class="right wide num">
        {prompt.usage && <span title={prompt.usage.last_used_at === null ? "not used yet" : `last used ${ago(prompt.usage.last_used_at)}`}>{count(prompt.usage.requests)}</span>}
      </td>
      <td class="right wide num nowrap">{prompt.usage?.p95_seconds != null && duration(prompt.usage.p95_seconds)}</td>
      <td class="wide">{latest.residency && <Tiers residency={latest.residency} />}</td>
      <td class="right wide num nowrap">{bytes(latest.size)}</td>
      <td class="right wide dim nowrap" title={date(latest.created_at)}>
        {ago(latest.created_at)}
      </td>
    </tr>
  );
}

function Meter({ share }: { share: number }) {
  return (
    <span class="bar" aria-hidden="true">
      <i style={{ width: `${share * 100}%` }} />
    </span>
  );
}
