// Who has done what, over all soft prompts that the key sees.
import { useState } from "preact/hooks";
import { call, query } from "../api/client";
import type { Change, ChangePage } from "../api/types";
import { href, route, setParams } from "../app/router";
import { returns } from "../app/server";
import { actorOf, ALL_ACTIONS, changeText } from "../prompts/changes";
import { ago, date } from "../ui/format";
import { useLoad } from "../ui/load";
import { Button, Chip, Empty, ErrorNote, Field, Loading, Swatch } from "../ui/parts";

const PAGE_SIZE = 100;
const TIMES: [string, string][] = [["", "any time"], ["3600", "the last hour"], ["86400", "the last day"], ["604800", "the last week"]];

export function ActivityPage() {
  const { params } = route.value;
  const filters = { prompt_id: params.get("prompt") ?? "", actor: params.get("actor") ?? "", action: params.get("action") ?? "", within: params.get("within") ?? "" };
  const key = `${JSON.stringify(filters)} ${returns.value}`;
  const [older, setOlder] = useState<{ key: string; pages: ChangePage[] }>({ key, pages: [] });
  const read = (before: number | null, signal?: AbortSignal) => {
    const { within, ...rest } = filters;
    const since = within && Math.floor(Date.now() / 1000) - Number(within);
    return call<ChangePage>("GET", `/v1/history${query({ ...rest, since, limit: PAGE_SIZE, before })}`, undefined, signal);
  };
  const { data, error, reload } = useLoad(key, (signal) => read(null, signal));
  const pages = [...(data ? [data] : []), ...(older.key === key ? older.pages : [])];
  const last = pages.at(-1);
  const changes = pages.flatMap((page) => page.data);

  async function more() {
    const page = await read(last!.last_id);
    setOlder({ key, pages: [...pages.slice(1), page] });
  }

  return (
    <>
      <div class="title">
        <h1>Activity</h1>
      </div>
      <section class="card" aria-label="Changes">
        <div class="toolbar pad filters">
          <Field label="Soft prompt" value={filters.prompt_id} onInput={(value) => setParams({ prompt: value })} />
          <Field label="Key" value={filters.actor} onInput={(value) => setParams({ actor: value })} />
          <Choice label="Action" value={filters.action} options={[["", "any"], ...ALL_ACTIONS.map((action): [string, string] => [action, action.replaceAll("_", " ")])]} onChange={(value) => setParams({ action: value })} />
          <Choice label="Time" value={filters.within} options={TIMES} onChange={(value) => setParams({ within: value })} />
        </div>
        {error && <ErrorNote error={error} retry={reload} />}
        {!data && !error && <Loading />}
        {data && changes.length === 0 && <Empty title="Nothing has been changed.">Uploads, promotions and deletions are listed here, with the key that made them.</Empty>}
        {changes.length > 0 && <Changes changes={changes} />}
        {last?.has_more && (
          <div class="pad">
            <Button onClick={() => void more()}>Show older ones</Button>
          </div>
        )}
      </section>
    </>
  );
}

function Choice(props: { label: string; value: string; options: [string, string][]; onChange: (value: string) => void }) {
  return (
    <label class="field">
      <span class="label">{props.label}</span>
      <select value={props.value} onChange={(event) => props.onChange(event.currentTarget.value)}>
        {props.options.map(([value, text]) => (
          <option key={value} value={value}>
            {text}
          </option>
        ))}
      </select>
    </label>
  );
}

function Changes({ changes }: { changes: Change[] }) {
  return (
    <table class="prompts">
      <thead>
        <tr>
          <th scope="col">Soft prompt</th>
          <th scope="col">Change</th>
          <th scope="col" class="mid">Key</th>
          <th scope="col" class="right">When</th>
        </tr>
      </thead>
      <tbody>
        {changes.map((change) => (
          <tr key={change.id}>
            <td>
              {change.prompt_id && (
                <span class="name">
                  <Swatch name={change.prompt_id} />
                  <a href={href(["prompts", change.prompt_id])}>{change.prompt_id}</a>
                </span>
              )}
            </td>
            <td class="any">
              {changeText(change)} {change.imported && <Chip>imported</Chip>} {change.reason && <span class="dim3">“{change.reason}”</span>}
            </td>
            <td class="mid">
              {actorOf(change) && (
                <a class="chip" href={href(["activity"], { actor: actorOf(change) })}>
                  {actorOf(change)}
                </a>
              )}
            </td>
            <td class="right dim" title={date(change.created_at)}>
              {ago(change.created_at)}
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}
