// Training runs that are reported to this server: the list, and one of them or two side by side.
import { useState } from "preact/hooks";
import { call, query } from "../api/client";
import type { Run, RunPage } from "../api/types";
import { merged, useJobs } from "../app/jobs";
import { href, route } from "../app/router";
import { returns } from "../app/server";
import { ago, percent } from "../ui/format";
import { useLoad } from "../ui/load";
import { Button, Card, Chip, Empty, ErrorNote, Loading, Swatch } from "../ui/parts";
import { methodName, stagesOf, stateKind, stateText } from "./model";
import { RunCard } from "./run";

const PAGE_SIZE = 50;

export function TrainingPage() {
  const { parts, params } = route.value;
  const chosen = parts[1];
  const key = returns.value.toString();
  const [older, setOlder] = useState<{ key: string; pages: RunPage[] }>({ key, pages: [] });
  const changed = useJobs<Run>("run");
  const read = (after: string | null, signal?: AbortSignal) => call<RunPage>("GET", `/v1/runs${query({ limit: PAGE_SIZE, after })}`, undefined, signal);
  const { data, error, reload } = useLoad(key, (signal) => read(null, signal));
  const pages = [...(data ? [data] : []), ...(older.key === key ? older.pages : [])];
  const last = pages.at(-1);
  const runs = merged(
    pages.flatMap((page) => page.data),
    changed,
  );

  return (
    <>
      <div class="title">
        <h1>Training</h1>
      </div>
      {error && <ErrorNote error={error} retry={reload} />}
      {!data && !error && <Loading />}
      {data && runs.length === 0 && (
        <Card title="No training runs yet">
          <Empty title="A training that publishes to this server is shown here while it runs.">
            <pre>prelude train --model MODEL --data train.jsonl --id NAME --push</pre>
            <p>
              With <code>--report</code> and this server's address, one that does not publish is shown too.
            </p>
          </Empty>
        </Card>
      )}
      {runs.length > 0 && (
        <div class="cols evaluations">
          <Card title="All">
            <ul class="lines picks">
              {runs.map((run) => (
                <li key={run.id}>
                  <a href={href(["training", run.id])} aria-current={run.id === chosen ? "page" : undefined}>
                    <span class="row">
                      <Swatch name={run.prompt_id} />
                      <b class="any grow">{run.version === null ? run.prompt_id : `${run.prompt_id}@${run.version}`}</b>
                      <Chip kind={stateKind(run)}>{stateText(run)}</Chip>
                    </span>
                    <small class="dim3">
                      {methodName(run)}, {trained(run)}
                      {ago(run.started_at)}
                    </small>
                  </a>
                </li>
              ))}
            </ul>
            {last?.has_more && (
              <div class="pad">
                <Button onClick={() => void read(last.last_id).then((page) => setOlder({ key, pages: [...pages.slice(1), page] }))}>Show older ones</Button>
              </div>
            )}
          </Card>
          {chosen ? (
            <RunCard key={chosen} id={chosen} runs={runs} other={params.get("beside")} onGone={reload} />
          ) : (
            <Card title="None chosen">
              <Empty title="Choose a run to see its curves, scores and golden check." />
            </Card>
          )}
        </div>
      )}
    </>
  );
}

/** The accuracy after the training, if it is known. */
function trained(run: Run): string {
  const accuracy = Object.fromEntries(stagesOf(run))["trained"]?.accuracy;
  return accuracy === undefined ? "" : `${percent(accuracy, 1)} right on held-out rows, `;
}
