// Evaluations: the list, and one of them or two side by side.
import { useState } from "preact/hooks";
import { call, query } from "../api/client";
import type { Evaluation, EvaluationPage } from "../api/types";
import { hasAny, merged, useJobs } from "../app/jobs";
import { go, href, route } from "../app/router";
import { returns } from "../app/server";
import { ago } from "../ui/format";
import { useLoad } from "../ui/load";
import { Button, Card, Chip, Empty, ErrorNote, Loading, Swatch } from "../ui/parts";
import { CreateDialog } from "./create";
import { dataText, scoreKind, scoreText, titleOf } from "./model";
import { EvaluationCard } from "./one";

const PAGE_SIZE = 50;

export function EvaluationsPage() {
  const { parts, params } = route.value;
  const chosen = parts[1];
  const prompt = params.get("prompt");
  const key = `${prompt} ${returns.value}`;
  const [older, setOlder] = useState<{ key: string; pages: EvaluationPage[] }>({ key, pages: [] });
  const [isCreating, setCreating] = useState(false);
  const changed = useJobs<Evaluation>("evaluation");
  const read = (after: string | null, signal?: AbortSignal) =>
    call<EvaluationPage>("GET", `/v1/evaluations${query({ prompt_id: prompt, limit: PAGE_SIZE, after })}`, undefined, signal);
  const { data, error, reload } = useLoad(key, (signal) => read(null, signal));
  const pages = [...(data ? [data] : []), ...(older.key === key ? older.pages : [])];
  const last = pages.at(-1);
  const list = merged(
    pages.flatMap((page) => page.data),
    changed,
  ).filter((one) => !prompt || one.prompt_id === prompt);

  return (
    <>
      <div class="title">
        <h1>Evaluations</h1>
        {prompt && (
          <a class="chip" href={href(["evaluations"])}>
            of {prompt}: show all
          </a>
        )}
        <span class="grow" />
        <Button kind="primary" icon="plus" needs="generate" onClick={() => setCreating(true)}>
          New
        </Button>
      </div>
      {error && <ErrorNote error={error} retry={reload} />}
      {!data && !error && <Loading />}
      {data && list.length === 0 && (
        <Card title="No evaluations yet">
          <Empty title="An evaluation tells how many labelled rows a soft prompt answers correctly.">
            <p>Choose New and a file of labelled rows, or keep the result of the command line:</p>
            <pre>prelude eval NAME --data test.jsonl --record</pre>
            <p>Two evaluations on the same file are compared row by row.</p>
          </Empty>
        </Card>
      )}
      {list.length > 0 && (
        <div class="cols evaluations">
          <Card title="All">
            <ul class="lines picks">
              {list.map((one) => (
                <li key={one.id}>
                  <a href={href(["evaluations", one.id], { prompt })} aria-current={one.id === chosen ? "page" : undefined}>
                    <span class="row">
                      <Swatch name={one.prompt_id} />
                      <b class="any grow">{titleOf(one)}</b>
                      <Chip kind={scoreKind(one)}>{scoreText(one)}</Chip>
                    </span>
                    <small class="dim3">
                      {one.name && `${one.name}, `}
                      {dataText(one)}, {ago(one.created_at)}
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
            <EvaluationCard key={chosen} id={chosen} to={params.get("to")} heard={changed.get(chosen)} onGone={reload} />
          ) : (
            <Card title="None chosen">
              <Empty title="Choose an evaluation to see its scores and rows.">
                {!hasAny("generate", "prompts:read") && <p>This key may not follow changes.</p>}
              </Empty>
            </Card>
          )}
        </div>
      )}
      {isCreating && (
        <CreateDialog
          model={prompt ?? ""}
          onClose={() => setCreating(false)}
          onCreated={(id) => {
            setCreating(false);
            reload();
            go(href(["evaluations", id]));
          }}
        />
      )}
    </>
  );
}
