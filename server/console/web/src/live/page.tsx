// What the engine does now, and what it did in the last hour.
import { batch } from "@preact/signals";
import { useEffect, useState } from "preact/hooks";
import { ApiError, call, query, send } from "../api/client";
import { onEvent, shownReplica, wanted } from "../app/events";
import { returns } from "../app/server";
import { count, duration, plural } from "../ui/format";
import { useLoad } from "../ui/load";
import { Button, Card, Chip, Empty, ErrorNote, Loading, Segments, Swatch } from "../ui/parts";
import { BatchPicture, BatchTable } from "./batch";
import { HourCard, Tiles } from "./load";
import { type Blocks, colourName, type Engine, nameOf, namesOf, type Point, REASONS, type Stats } from "./model";
import { PoolCard } from "./pool";

const MAX_POINTS = 360;

type View = "picture" | "table";

/** The engine, and which server it is of: `replicas` has more than one name behind the ingress of a cluster only. */
interface Seen {
  engine: Engine;
  replica: string;
  replicas: string[];
}

async function readEngine(replica: string, signal: AbortSignal): Promise<Seen> {
  const response = await send("GET", `/v1/engine${query({ replica })}`, undefined, signal);
  const names = response.headers.get("X-Prelude-Replicas")?.split(", ") ?? [];
  return { engine: (await response.json()) as Engine, replica: response.headers.get("X-Prelude-Replica") ?? "", replicas: names };
}

export function LivePage() {
  const [isPaused, setPaused] = useState(false);
  const [view, setView] = useState<View>("picture");
  const [live, setLive] = useState<Engine>();
  const [pool, setPool] = useState<Blocks>();
  const [newer, setNewer] = useState<Point[]>([]);
  const [replica, setReplica] = useState("");
  const first = useLoad(`engine ${returns.value} ${replica}`, (signal) => readEngine(replica, signal));
  const hour = useLoad(`stats ${returns.value} ${replica}`, (signal) => call<Stats>("GET", `/v1/stats${query({ replica })}`, undefined, signal));

  const show = (name: string) => {
    setReplica(name);
    setLive(undefined);
    setPool(undefined);
    setNewer([]);
  };
  // Of several replicas each request could be answered by another one: stay with the first that answered.
  const [replicas, setReplicas] = useState<string[]>([]);
  useEffect(() => {
    if (first.data === undefined) return;
    setReplicas(first.data.replicas);
    if (replica === "" && first.data.replicas.length > 1) show(first.data.replica);
  }, [first.data]);
  // A replica that has ended is forgotten.
  useEffect(() => {
    if (replica !== "" && first.error instanceof ApiError && first.error.status === 404) show("");
  }, [first.error]);

  useEffect(() => {
    if (isPaused) return undefined;
    const listen = (topics: string, name: string) =>
      batch(() => {
        wanted.value = topics;
        shownReplica.value = name;
      });
    listen("live,stats", replica);
    const ends = [
      onEvent<Engine>("live", setLive),
      onEvent<Blocks>("pool", setPool),
      onEvent<Point>("stats", (point) => setNewer((before) => [...before, point].slice(-MAX_POINTS))),
    ];
    return () => {
      listen("", "");
      for (const end of ends) end();
    };
  }, [isPaused, replica]);

  const engine = live ?? first.data?.engine;
  const last = hour.data?.points.at(-1)?.at ?? 0;
  const stats = hour.data && { ...hour.data, points: [...hour.data.points, ...newer.filter((point) => point.at > last)].slice(-MAX_POINTS) };
  const blocks = pool ?? first.data?.engine.blocks;
  return (
    <>
      <div class="title">
        <h1>Live</h1>
        {engine && <Chip>{count(engine.running)} running</Chip>}
        <span class="grow" />
        {replicas.length > 1 && (
          <label class="row">
            <span class="label">Replica</span>
            <select value={replica} onChange={(event) => show(event.currentTarget.value)}>
              {replicas.map((name) => (
                <option key={name}>{name}</option>
              ))}
            </select>
          </label>
        )}
        <Button icon={isPaused ? "play" : "pause"} onClick={() => setPaused(!isPaused)}>
          {isPaused ? "Go on" : "Pause"}
        </Button>
      </div>
      {first.error && !engine && <ErrorNote error={first.error} retry={first.reload} />}
      {!engine && !first.error && <Loading />}
      {engine && (
        <>
          <Tiles engine={engine} points={stats?.points ?? []} />
          <div class="cols side-by-side">
            <Card title="The running batch" side={engine.shows_rows && <Segments label="View" value={view} options={[["picture", "Picture"], ["table", "Table"]]} onChange={setView} />}>
              {!engine.shows_rows ? (
                <Empty title={`${count(engine.running)} running, ${count(engine.waiting)} waiting`}>This engine does not show its rows.</Empty>
              ) : view === "picture" ? (
                <BatchPicture engine={engine} />
              ) : (
                <BatchTable engine={engine} />
              )}
            </Card>
            <div class="stack">
              <WaitingCard engine={engine} />
              <ResidentCard engine={engine} />
              {blocks && <PoolCard blocks={{ ...blocks, used: engine.blocks.used, idle: engine.blocks.idle }} />}
            </div>
          </div>
        </>
      )}
      {stats && stats.points.length > 0 && <HourCard stats={stats} />}
    </>
  );
}

function WaitingCard({ engine }: { engine: Engine }) {
  const rows = engine.rows.filter((row) => row.phase === "waiting");
  return (
    <Card title="Waiting" side={<span class="dim3 num">{count(engine.waiting)}</span>}>
      {rows.length === 0 ? (
        <p class="pad dim3">No sequence waits.</p>
      ) : (
        <ul class="lines">
          {rows.map((row, index) => (
            <li key={index}>
              <span class="row">
                <Swatch name={colourName(row.name)} />
                <b class="any">{nameOf(row)}</b>
                <span class="grow" />
                <span class="num dim">{duration(row.age_seconds)}</span>
              </span>
              <small class="dim3">{REASONS[row.reason ?? ""] ?? row.reason}</small>
            </li>
          ))}
        </ul>
      )}
    </Card>
  );
}

function ResidentCard({ engine }: { engine: Engine }) {
  const shown = engine.soft_prompts.map((one, index) => ({ ...one, names: namesOf(engine, index) })).filter((one) => one.names.length > 0);
  const others = engine.soft_prompts.length - shown.length;
  return (
    <Card title="Soft prompts on the device" side={<span class="dim3 num">{count(engine.soft_prompts.length)}</span>}>
      {engine.soft_prompts.length === 0 && <p class="pad dim3">None yet: the first request with one fills its blocks.</p>}
      <ul class="lines">
        {shown.map((one) => (
          <li key={`${one.name}/${one.task_id}`}>
            <span class="row">
              <Swatch name={colourName(one.names[0]!)} />
              <b class="any">{one.names.join(", ")}</b>
              {one.task_id !== null && <Chip>task {one.task_id}</Chip>}
              <Chip kind={one.state === "used" ? "ok" : ""}>{one.state}</Chip>
              <span class="grow" />
              <span class="num dim">
                {plural(one.blocks, "block")}, {plural(one.users, "user")}
              </span>
            </span>
          </li>
        ))}
        {others > 0 && <li class="dim3">{count(others)} not used yet, or of other tenants</li>}
      </ul>
    </Card>
  );
}
