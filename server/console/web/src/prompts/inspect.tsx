// What a soft prompt's virtual tokens are near to, and how long they are.
import { useState } from "preact/hooks";
import { call, path, query } from "../api/client";
import type { Inspection, Version } from "../api/types";
import { returns } from "../app/server";
import { colourOf } from "../ui/colours";
import { decimals } from "../ui/format";
import { useLoad } from "../ui/load";
import { Card, Empty, ErrorNote, Field, Loading, Scroll, Segments } from "../ui/parts";

const NUM_NEAREST = 5;

type View = "strip" | "table";

export function InspectCard({ version }: { version: Version }) {
  const [view, setView] = useState<View>("strip");
  const [task, setTask] = useState("0");
  const task_id = version.num_tasks === null ? null : task;
  const key = `${version.id}@${version.version} ${task_id} ${returns.value}`;
  const { data, error, reload } = useLoad(key, (signal) =>
    call<Inspection>("GET", path`/v1/prompts/${version.id}/inspect` + query({ version: version.version, task_id, top_k: NUM_NEAREST }), undefined, signal),
  );
  return (
    <Card
      title={`Inspect ${version.id}@${version.version}`}
      side={data?.tokens && <Segments label="View" value={view} options={[["strip", "Nearest tokens"], ["table", `All ${data.tokens.length} × ${NUM_NEAREST}`]]} onChange={setView} />}
    >
      {version.num_tasks !== null && (
        <div class="pad">
          <Field label={`Task, 0 to ${version.num_tasks - 1}`} value={task} onInput={setTask} inputMode="numeric" />
        </div>
      )}
      {error && <ErrorNote error={error} retry={reload} />}
      {!data && !error && <Loading />}
      {data?.tokens && (view === "strip" ? <Strip data={data} /> : <NearestTable data={data} />)}
      {data?.layers && <Layers data={data} />}
      {data?.modules && <Modules data={data} />}
    </Card>
  );
}

/** A token's text with its spaces and line breaks visible. */
export const visible = (text: string): string => text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥");

function Strip({ data }: { data: Inspection }) {
  const { class: kind, style } = colourOf(data.id);
  const tokens = data.tokens ?? [];
  const most = Math.max(...tokens.map((token) => token.norm), 1e-9);
  return (
    <div class="pad stack">
      <p class="dim">
        The bar is a virtual token’s norm{data.vocabulary && `; the vocabulary’s is ${decimals(data.vocabulary.norm_mean, 2)} ± ${decimals(data.vocabulary.norm_std, 2)}`}. Below it
        are the token that it is nearest to and the cosine between the two.
      </p>
      <Scroll label="Virtual tokens">
        <div class={`strip ${kind}`} style={style} role="list">
          {tokens.map((token) => (
            <div key={token.index} class="vt" role="listitem">
              <span class="h" title={`norm ${decimals(token.norm, 3)}`}>
                <i style={{ height: `${(token.norm / most) * 100}%` }} />
              </span>
              <code title={token.nearest[0]?.text}>{visible(token.nearest[0]?.text ?? "")}</code>
              <small class="num">{token.nearest[0]?.similarity.toFixed(2)}</small>
            </div>
          ))}
        </div>
      </Scroll>
    </div>
  );
}

function NearestTable({ data }: { data: Inspection }) {
  return (
    <Scroll label="Nearest tokens of each virtual token">
      <table>
        <thead>
          <tr>
            <th scope="col">Virtual token</th>
            <th scope="col" class="right">Norm</th>
            {Array.from({ length: NUM_NEAREST }, (_, index) => (
              <th key={index} scope="col">
                {index === 0 ? "Nearest" : `${index + 1}.`}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {data.tokens?.map((token) => (
            <tr key={token.index}>
              <th scope="row" class="num">{token.index}</th>
              <td class="right num">{decimals(token.norm, 3)}</td>
              {token.nearest.map((near) => (
                <td key={near.token_id} class="nowrap">
                  <code>{visible(near.text)}</code> <span class="dim3 num">{near.similarity.toFixed(2)}</span>
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </Scroll>
  );
}

function Layers({ data }: { data: Inspection }) {
  const { class: kind, style } = colourOf(data.id);
  const layers = data.layers ?? [];
  const most = Math.max(...layers.flatMap((layer) => [layer.keys.max, layer.values.max]), 1e-9);
  if (layers.length === 0) return <Empty title="There is no layer to show." />;
  return (
    <Scroll label="Norms by layer">
      <table class={kind} style={style}>
        <thead>
          <tr>
            <th scope="col">Layer</th>
            <th scope="col">Keys: mean norm (least to most)</th>
            <th scope="col">Values: mean norm (least to most)</th>
          </tr>
        </thead>
        <tbody>
          {layers.map((layer) => (
            <tr key={layer.index}>
              <th scope="row" class="num">{layer.index}</th>
              {[layer.keys, layer.values].map((norms, index) => (
                <td key={index} class="num nowrap">
                  <span class="bar tinted" aria-hidden="true">
                    <i style={{ width: `${(norms.mean / most) * 100}%` }} />
                  </span>
                  {decimals(norms.mean, 2)} <span class="dim3">({decimals(norms.min, 2)} to {decimals(norms.max, 2)})</span>
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </Scroll>
  );
}

function Modules({ data }: { data: Inspection }) {
  return (
    <Scroll label="Changed modules">
      <table>
        <thead>
          <tr>
            <th scope="col">Module</th>
            <th scope="col" class="right">Rank</th>
            <th scope="col" class="right">Scale</th>
            <th scope="col" class="right">Change, share of the weight’s norm</th>
          </tr>
        </thead>
        <tbody>
          {data.modules?.map((module) => (
            <tr key={module.name}>
              <th scope="row">
                <code>{module.name}</code>
              </th>
              <td class="right num">{module.rank}</td>
              <td class="right num">{decimals(module.scale, 3)}</td>
              <td class="right num">{decimals(module.share, 4)}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </Scroll>
  );
}
