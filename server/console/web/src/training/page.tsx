// Training runs that are reported to this server: the list, and one of them or two side by side.
import { call, query } from "../api/client";
import type { Run, RunPage } from "../api/types";
import { JobPage, PAGE_SIZE, useJobList } from "../app/job_page";
import { href, route } from "../app/router";
import { returns } from "../app/server";
import { ago, percent } from "../ui/format";
import { Card, Empty } from "../ui/parts";
import { methodName, stagesOf, stateKind, stateText } from "./model";
import { RunCard } from "./run";

export function TrainingPage() {
  const { parts, params } = route.value;
  const chosen = parts[1];
  const list = useJobList<Run>("run", returns.value.toString(), (after, signal) => call<RunPage>("GET", `/v1/runs${query({ limit: PAGE_SIZE, after })}`, undefined, signal));
  return (
    <JobPage
      list={list}
      title="Training"
      empty={<NoRuns />}
      chosen={chosen}
      lineOf={(run) => ({
        href: href(["training", run.id]),
        prompt: run.prompt_id,
        name: run.version === null ? run.prompt_id : `${run.prompt_id}@${run.version}`,
        state: stateText(run),
        stateKind: stateKind(run),
        text: `${methodName(run)}, ${trained(run)}${ago(run.started_at)}`,
      })}
    >
      {chosen ? (
        <RunCard key={chosen} id={chosen} runs={list.jobs} other={params.get("beside")} onGone={list.reload} />
      ) : (
        <Card title="None chosen">
          <Empty title="Choose a run to see its curves, scores and golden check." />
        </Card>
      )}
    </JobPage>
  );
}

function NoRuns() {
  return (
    <Card title="No training runs yet">
      <Empty title="A training that publishes to this server is shown here while it runs.">
        <pre>prelude train --model MODEL --data train.jsonl --id NAME --push</pre>
        <p>
          With <code>--report</code> and this server's address, one that does not publish is shown too.
        </p>
      </Empty>
    </Card>
  );
}

/** The accuracy after the training, if it is known. */
function trained(run: Run): string {
  const accuracy = Object.fromEntries(stagesOf(run))["trained"]?.accuracy;
  return accuracy === undefined ? "" : `${percent(accuracy, 1)} right on held-out rows, `;
}
