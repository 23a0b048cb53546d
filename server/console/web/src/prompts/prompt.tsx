// One soft prompt: its versions, what they are, and what can be done with them.
import { useRef, useState } from "preact/hooks";
import { call, path, query } from "../api/client";
import type { Change, ChangePage, Prompt, Version, VersionPage } from "../api/types";
import { useCatalog } from "../app/events";
import { href, route, setParams } from "../app/router";
import { returns } from "../app/server";
import { ago, bytes, date, method, plural } from "../ui/format";
import { useLoad } from "../ui/load";
import { Button, Card, Chip, Empty, ErrorNote, Loading, Segments, Swatch } from "../ui/parts";
import { colourOf } from "../ui/colours";
import { Icon } from "../ui/icons";
import { actorOf, changeText } from "./changes";
import { DeleteDialog } from "./delete";
import { DiffCard } from "./diff";
import { InspectCard } from "./inspect";
import { movable, PromoteDialog, RollbackDialog } from "./promote";
import { RolloutCard, RolloutDialog } from "./rollout";
import { VersionCard } from "./version";

/** What the page of one soft prompt shows. */
export interface Details {
  prompt: Prompt;
  versions: Version[];
  history: Change[];
}

export async function readDetails(name: string, signal: AbortSignal): Promise<Details> {
  const get = <T,>(where: string) => call<T>("GET", where, undefined, signal);
  const [prompt, versions, history] = await Promise.all([
    get<Prompt>(path`/v1/prompts/${name}`),
    get<VersionPage>(path`/v1/prompts/${name}/versions` + query({ include: "residency" })),
    get<ChangePage>(path`/v1/prompts/${name}/history`),
  ]);
  return { prompt, versions: versions.data, history: history.data };
}

/** The aliases that point at a version. */
export function aliasesOf(prompt: Prompt, version: number): string[] {
  return Object.keys(prompt.aliases).filter((alias) => prompt.aliases[alias] === version);
}

/** What the playground compares: the version that the bare name means, and the one that is looked at. */
function besideLatest({ id, aliases: { latest } }: Prompt, version: number): string[] {
  return [...(latest === undefined ? [] : [id]), ...(latest === version ? [] : [`${id}@${version}`])];
}

type Open = { kind: "promote"; version: number } | { kind: "rollback" } | { kind: "rollout"; alias: string } | { kind: "delete"; version?: number } | null;

export function PromptPage({ name }: { name: string }) {
  const { data, error, reload } = useLoad(`${name} ${returns.value}`, (signal) => readDetails(name, signal));
  const [open, setOpen] = useState<Open>(null);
  const isStale = useRef(false);
  // A dialog goes on from what it showed when it was opened; the server refuses a move of an alias that moved meanwhile.
  useCatalog(() => {
    if (open) isStale.current = true;
    else reload();
  }, name);
  const close = () => {
    setOpen(null);
    if (isStale.current) reload();
    isStale.current = false;
  };
  if (error) return <Missing name={name} error={error} reload={reload} />;
  if (!data) return <><h1>{name}</h1><Loading /></>;
  const { prompt, versions, history } = data;
  const version = versions.find((one) => one.version === Number(route.value.params.get("version"))) ?? versions.find((one) => one.version === prompt.latest.version) ?? prompt.latest;
  const latest = prompt.aliases.latest;
  return (
    <>
      <div class="title">
        <a class="btn quiet only" href={href(["prompts"])} aria-label="All soft prompts" title="All soft prompts">
          ←
        </a>
        <Swatch name={name} />
        <h1>{name}</h1>
        <Chip>{method(prompt.latest.peft_type)}</Chip>
        <span class="grow" />
        <a class="btn" href={href(["playground"], { with: besideLatest(prompt, version.version).join(",") })}>
          <Icon name="playground" /> Open in playground
        </a>
        <a class="btn" href={href(["evaluations"], { prompt: name })}>
          <Icon name="evaluations" /> See evaluations
        </a>
        <Button icon="upload" needs="prompts:write" onClick={() => (location.hash = href(["upload"], { id: name }))}>
          Upload a version
        </Button>
        <Button kind="danger" needs="prompts:write" onClick={() => setOpen({ kind: "delete" })}>
          Delete
        </Button>
      </div>
      {prompt.latest.description && <p class="dim any">{prompt.latest.description}</p>}
      <div class="cols side-by-side">
        <div class="stack">
          <Rail details={data} at={version.version} onRollback={() => setOpen({ kind: "rollback" })} />
          <InspectCard version={version} />
        </div>
        <div class="stack">
          <VersionCard
            prompt={prompt}
            version={version}
            onPromote={() => setOpen({ kind: "promote", version: version.version })}
            onDelete={() => setOpen({ kind: "delete", version: version.version })}
          />
          {latest !== undefined && latest !== version.version && <DiffCard name={name} from={latest} to={version.version} />}
          <RolloutCard prompt={prompt} onOpen={(alias) => setOpen({ kind: "rollout", alias })} onDone={reload} />
          <HistoryCard history={history} />
        </div>
      </div>
      {open?.kind === "promote" && <PromoteDialog details={data} version={open.version} onClose={close} onDone={reload} />}
      {open?.kind === "rollback" && <RollbackDialog details={data} onClose={close} onDone={reload} />}
      {open?.kind === "rollout" && <RolloutDialog details={data} alias={open.alias} onClose={close} onDone={reload} />}
      {open?.kind === "delete" && <DeleteDialog details={data} version={open.version} onClose={close} onDone={reload} />}
    </>
  );
}

function Missing({ name, error, reload }: { name: string; error: Parameters<typeof ErrorNote>[0]["error"]; reload: () => void }) {
  if (error.code !== "prompt_not_found") return <><h1>{name}</h1><ErrorNote error={error} retry={reload} /></>;
  return (
    <>
      <h1>{name}</h1>
      <div class="card">
        <Empty title="There is no soft prompt of this name.">
          <p>It may have been deleted, or it belongs to another tenant.</p>
          <a href={href(["prompts"])}>See all soft prompts</a>
        </Empty>
      </div>
    </>
  );
}

interface RailProps {
  details: Details;
  at: number;
  onRollback: () => void;
}

function Rail({ details, at, onRollback }: RailProps) {
  const { prompt, versions } = details;
  const { class: kind, style } = colourOf(prompt.id);
  return (
    <Card
      title={plural(prompt.num_versions, "version")}
      side={
        <Button small needs="prompts:write" blocked={movable(details).length > 0 ? undefined : "No alias has been moved yet."} onClick={onRollback}>
          Roll back
        </Button>
      }
    >
      <ul class={`rail ${kind}`} style={style}>
        {versions.map((version) => {
          const aliases = aliasesOf(prompt, version.version);
          return (
            <li key={version.version}>
              <a
                href={href(["prompts", prompt.id], { version: version.version })}
                aria-current={version.version === at ? "true" : undefined}
                onClick={(event) => {
                  event.preventDefault();
                  setParams({ version: version.version });
                }}
              >
                <span class={`pt ${aliases.includes("latest") ? "on" : ""}`} />
                <span>
                  <span class="row">
                    <b>version {version.version}</b>
                    {aliases.map((alias) => (
                      <Chip key={alias} kind={alias === "latest" ? "alias" : ""}>
                        {alias}
                      </Chip>
                    ))}
                    {version.pinned && <Chip kind="ok">pinned</Chip>}
                  </span>
                  <small class="dim3">{[ago(version.created_at), version.created_by].filter(Boolean).join(" · ")}</small>
                </span>
                <span class="num dim">{bytes(version.size)}</span>
              </a>
            </li>
          );
        })}
      </ul>
    </Card>
  );
}

type Which = "all" | "moves";

function HistoryCard({ history }: { history: Change[] }) {
  const [which, setWhich] = useState<Which>("all");
  const shown = which === "all" ? history : history.filter((change) => change.alias !== null);
  return (
    <Card title="History" side={<Segments label="Changes" value={which} options={[["all", "All"], ["moves", "Aliases"]]} onChange={setWhich} />}>
      <ul class="lines">
        {shown.map((change) => (
          <li key={change.id}>
            <span class="any">
              {changeText(change)} {change.reason && <span class="dim3">“{change.reason}”</span>}
            </span>
            <small class="dim3" title={date(change.created_at)}>
              {[ago(change.created_at), actorOf(change)].filter(Boolean).join(" · ")}
            </small>
          </li>
        ))}
      </ul>
      {shown.length === 0 && <Empty title="No alias has been moved." />}
    </Card>
  );
}
