// Evaluations: the list, and one of them or two side by side.
import { useState } from "preact/hooks";
import { call, query } from "../api/client";
import type { Evaluation, EvaluationPage } from "../api/types";
import { JobPage, PAGE_SIZE, useJobList } from "../app/job_page";
import { hasAny } from "../app/jobs";
import { go, href, route } from "../app/router";
import { returns } from "../app/server";
import { ago } from "../ui/format";
import { Button, Card, Empty } from "../ui/parts";
import { CreateDialog } from "./create";
import { dataText, scoreKind, scoreText, titleOf } from "./model";
import { EvaluationCard } from "./one";

export function EvaluationsPage() {
  const { parts, params } = route.value;
  const chosen = parts[1];
  const prompt = params.get("prompt");
  const [isCreating, setCreating] = useState(false);
  const all = useJobList<Evaluation>("evaluation", `${prompt} ${returns.value}`, (after, signal) =>
    call<EvaluationPage>("GET", `/v1/evaluations${query({ prompt_id: prompt, limit: PAGE_SIZE, after })}`, undefined, signal),
  );
  const list = { ...all, jobs: all.jobs.filter((one) => !prompt || one.prompt_id === prompt) };

  return (
    <>
      <JobPage
        list={list}
        title="Evaluations"
        side={
          <>
            {prompt && (
              <a class="chip" href={href(["evaluations"])}>
                of {prompt}: show all
              </a>
            )}
            <span class="grow" />
            <Button kind="primary" icon="plus" needs="generate" onClick={() => setCreating(true)}>
              New
            </Button>
          </>
        }
        empty={<NoEvaluations />}
        chosen={chosen}
        lineOf={(one) => ({
          href: href(["evaluations", one.id], { prompt }),
          prompt: one.prompt_id,
          name: titleOf(one),
          state: scoreText(one),
          stateKind: scoreKind(one),
          text: `${one.name && `${one.name}, `}${dataText(one)}, ${ago(one.created_at)}`,
        })}
      >
        {chosen ? (
          <EvaluationCard key={chosen} id={chosen} to={params.get("to")} heard={list.changed.get(chosen)} onGone={list.reload} />
        ) : (
          <Card title="None chosen">
            <Empty title="Choose an evaluation to see its scores and rows.">{!hasAny("generate", "prompts:read") && <p>This key may not follow changes.</p>}</Empty>
          </Card>
        )}
      </JobPage>
      {isCreating && (
        <CreateDialog
          model={prompt ?? ""}
          onClose={() => setCreating(false)}
          onCreated={(id) => {
            setCreating(false);
            list.reload();
            go(href(["evaluations", id]));
          }}
        />
      )}
    </>
  );
}

function NoEvaluations() {
  return (
    <Card title="No evaluations yet">
      <Empty title="An evaluation tells how many labelled rows a soft prompt answers correctly.">
        <p>Choose New and a file of labelled rows, or keep the result of the command line:</p>
        <pre>prelude eval NAME --data test.jsonl --record</pre>
        <p>Two evaluations on the same file are compared row by row.</p>
      </Empty>
    </Card>
  );
}
