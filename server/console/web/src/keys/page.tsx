// The API keys of this server with their limits and use, and a new one.
import { useState } from "preact/hooks";
import { call } from "../api/client";
import type { Key, KeyPage } from "../api/types";
import { href } from "../app/router";
import { returns } from "../app/server";
import { lacking } from "../app/session";
import { ago, count, date } from "../ui/format";
import { useLoad, usePolling } from "../ui/load";
import { Button, Card, Chip, Empty, ErrorNote, Loading } from "../ui/parts";
import { NewKeyDialog } from "./dialog";
import { canMakeKeys } from "./new_key";

const POLL_SECONDS = 5;

export function KeysPage() {
  const [isOpen, setOpen] = useState(false);
  return (
    <>
      <div class="title">
        <h1>Keys</h1>
        <span class="grow" />
        <Button kind="primary" icon="plus" blocked={canMakeKeys() ? undefined : "The browser makes keys on pages over https, or from this machine, only. Use prelude key."} onClick={() => setOpen(true)}>
          New key
        </Button>
      </div>
      {lacking("admin") ? <p class="note warn">This key lacks the scope admin, so it cannot see the keys of this server.</p> : <Keys />}
      {isOpen && <NewKeyDialog onClose={() => setOpen(false)} />}
    </>
  );
}

function Keys() {
  const { data, error, reload } = useLoad(`keys ${returns.value}`, (signal) => call<KeyPage>("GET", "/v1/keys", undefined, signal));
  usePolling(reload, POLL_SECONDS);
  if (error) return <ErrorNote error={error} retry={reload} />;
  if (!data) return <Loading />;
  return (
    <Card title={`${data.data.length === 1 ? "1 key" : `${data.data.length} keys`}`} side={data.last_reload && <Reload reload={data.last_reload} />}>
      {data.data.length === 0 ? <NoKeys /> : <Table keys={data.data} />}
    </Card>
  );
}

function Reload({ reload: { at, error } }: { reload: NonNullable<KeyPage["last_reload"]> }) {
  return error === null ? (
    <span class="dim3" title={date(at)}>
      key file read {ago(at)}
    </span>
  ) : (
    <Chip kind="bad">
      {error}; the old keys remain
    </Chip>
  );
}

function NoKeys() {
  return (
    <Empty title="This server has no API keys.">
      <p>It answers every client that reaches it. Make a key, write its entry to a file, and start the server with it:</p>
      <pre>prelude serve --api-key-file keys.toml</pre>
    </Empty>
  );
}

function limitsText({ limits }: Key): string {
  const found = [];
  if (limits.requests_per_minute !== null) found.push(`${count(limits.requests_per_minute)} requests/min`);
  if (limits.tokens_per_minute !== null) found.push(`${count(limits.tokens_per_minute)} tokens/min`);
  if (limits.max_concurrency !== null) found.push(`${count(limits.max_concurrency)} at once`);
  return found.join(", ") || "none";
}

function Table({ keys }: { keys: Key[] }) {
  return (
    <table class="prompts">
      <thead>
        <tr>
          <th scope="col">Key</th>
          <th scope="col" class="mid">Tenant</th>
          <th scope="col">Scopes</th>
          <th scope="col" class="wide">Limits</th>
          <th scope="col" class="right mid">Running</th>
          <th scope="col" class="right">Requests</th>
          <th scope="col" class="right mid">Last used</th>
        </tr>
      </thead>
      <tbody>
        {keys.map((key) => (
          <tr key={key.id}>
            <td>
              <b class="any">{key.name ?? key.id}</b>
              {key.name && <small class="dim3"> {key.id}</small>}{" "}
              <a class="nowrap" href={href(["activity"], { actor: key.name ?? key.id })} aria-label={`Changes by ${key.name ?? key.id}`}>
                changes
              </a>
            </td>
            <td class="mid dim">{key.tenant ?? "its own"}</td>
            <td>
              <span class="row">
                {key.scopes.map((scope) => (
                  <Chip key={scope}>{scope}</Chip>
                ))}
              </span>
            </td>
            <td class="wide dim">{limitsText(key)}</td>
            <td class="right mid num">{count(key.running)}</td>
            <td class="right num">{count(key.requests)}</td>
            <td class="right mid dim nowrap" title={key.last_used_at === null ? undefined : date(key.last_used_at)}>
              {key.last_used_at === null ? "never" : ago(key.last_used_at)}
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}
