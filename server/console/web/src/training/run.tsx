// One training run, alone or beside another: curves, scores, golden check, settings, and from there to a promotion.
import { useEffect, useState } from "preact/hooks";
import { call, path, query } from "../api/client";
import type { Run, RunPoints } from "../api/types";
import { go, href, setParams } from "../app/router";
import { returns } from "../app/server";
import { PromoteFrom } from "../prompts/promote_from";
import { ago, count, date, decimals, duration, percent } from "../ui/format";
import { useLoad } from "../ui/load";
import { Button, Card, Chip, ErrorNote, Loading, Scroll } from "../ui/parts";
import { report, reportError } from "../ui/toast";
import { Curves, type Points } from "./curves";
import { goldenOf, goldenText, methodName, settingText, stagesOf, stateKind, stateText } from "./model";

/** The metrics of a run; later ones are read as it goes on. */
function usePoints(run: Run | undefined): Points {
  const [known, setKnown] = useState<{ id: string; points: Points }>({ id: "", points: [] });
  const id = run?.id ?? "";
  const points = known.id === id ? known.points : [];
  const turn = `${id} ${run?.updated_at} ${run?.step}`;
  useEffect(() => {
    if (!id) return undefined;
    const abort = new AbortController();
    // A run that resumes from an earlier step has dropped later ones.
    const last = points.at(-1)?.step ?? -1;
    const after = run && run.step < last ? -1 : Math.max(last - 1, -1);
    call<RunPoints>("GET", path`/v1/runs/${id}/metrics` + query({ after }), undefined, abort.signal).then(
      ({ data }) => setKnown({ id, points: [...points.filter(({ step }) => step <= after), ...data] }),
      (error: unknown) => abort.signal.aborted || reportError(error),
    );
    return () => abort.abort();
  }, [turn]);
  return points;
}

export function RunCard({ id, runs, other, onGone }: { id: string; runs: Run[]; other: string | null; onGone: () => void }) {
  const heard = runs.find((run) => run.id === id);
  const { data, error, reload } = useLoad(`${id} ${returns.value}`, (signal) => call<Run>("GET", path`/v1/runs/${id}`, undefined, signal));
  const run = heard && (!data || heard.updated_at >= data.updated_at) ? heard : data;
  const beside = runs.find((one) => one.id === other && one.id !== id);
  const points = usePoints(run);
  const besidePoints = usePoints(beside);
  const [isPromoting, setPromoting] = useState(false);
  if (error && !run) return <ErrorNote error={error} retry={reload} />;
  if (!run) return <Loading />;
  const golden = goldenOf(run);

  async function remove() {
    try {
      await call("DELETE", path`/v1/runs/${id}`);
      report("The run is deleted; its version stays.");
      go(href(["training"]));
      onGone();
    } catch (failure) {
      reportError(failure);
    }
  }

  return (
    <Card
      title={`${run.prompt_id}, ${methodName(run)}`}
      side={
        <>
          {run.version !== null && (
            <Button kind="primary" needs="prompts:write" onClick={() => setPromoting(true)}>
              Promote version {run.version}
            </Button>
          )}
          <Button needs="prompts:write" onClick={() => void remove()}>
            Delete
          </Button>
        </>
      }
    >
      <div class="pad stack">
        <p class="dim">
          <Chip kind={stateKind(run)}>{stateText(run)}</Chip> step {count(run.step)}
          {run.num_steps !== null && ` of ${count(run.num_steps)}`}, began <span title={date(run.started_at)}>{ago(run.started_at)}</span>
          {run.finished_at !== null && `, took ${duration(run.finished_at - run.started_at)}`}
          {run.best_step !== null && `, best at step ${count(run.best_step)}`}
        </p>
        {run.is_silent && <p class="note warn">This run has not reported since {date(run.updated_at)}. Its process may have ended, or cannot reach this server.</p>}
        {run.error && (
          <p class="note bad" role="alert">
            {run.error}
          </p>
        )}
        {run.status === "running" && run.num_steps !== null && <progress max={run.num_steps} value={run.step} aria-label="Steps" />}
        {golden && <p class={`note ${golden.is_passed ? "ok" : "bad"}`}>{goldenText(golden)}.</p>}
        {run.version !== null && (
          <p>
            Published as{" "}
            <a href={href(["prompts", run.prompt_id], { version: run.version })}>
              {run.prompt_id}@{run.version}
            </a>
            {run.alias && (
              <>
                , <Chip kind="alias">{run.alias}</Chip>
              </>
            )}
            . Evaluate it before it is promoted: <code>prelude eval {run.prompt_id}@{run.version} --data test.jsonl --record</code>
          </p>
        )}
        {runs.length > 1 && (
          <label class="field">
            <span class="label">Beside it</span>
            <select value={beside?.id ?? ""} onChange={(event) => setParams({ beside: event.currentTarget.value || null })}>
              <option value="">nothing</option>
              {runs
                .filter((one) => one.id !== id)
                .map((one) => (
                  <option key={one.id} value={one.id}>
                    {one.prompt_id}, {methodName(one)}, {ago(one.started_at)}
                  </option>
                ))}
            </select>
          </label>
        )}
        {points.length > 0 ? (
          <Curves curves={[{ name: run.prompt_id, points }, ...(beside ? [{ name: `${beside.prompt_id}, ${methodName(beside)}`, points: besidePoints }] : [])]} />
        ) : (
          <p class="dim3">No metrics yet.</p>
        )}
        <Stages runs={beside ? [run, beside] : [run]} />
        {run.warnings.length > 0 && (
          <div class="note warn">
            <ul>
              {run.warnings.map((warning) => (
                <li key={warning}>{warning}</li>
              ))}
            </ul>
          </div>
        )}
        <SettingsTable runs={beside ? [run, beside] : [run]} />
      </div>
      {isPromoting && run.version !== null && <PromoteFrom name={run.prompt_id} version={run.version} onClose={() => setPromoting(false)} />}
    </Card>
  );
}

const nameOf = (run: Run, runs: Run[]): string => (runs.length > 1 && runs[0]!.prompt_id === runs[1]!.prompt_id ? `${run.prompt_id}, ${ago(run.started_at)}` : run.prompt_id);

function Stages({ runs }: { runs: Run[] }) {
  const stages = [...new Set(runs.flatMap((run) => stagesOf(run).map(([stage]) => stage)))];
  if (stages.length === 0) return null;
  return (
    <Scroll label="Scores on held-out rows">
      <table>
        <thead>
          <tr>
            <th scope="col">On held-out rows</th>
            {runs.map((run) => (
              <th key={run.id} scope="col" class="right">
                {nameOf(run, runs)}: loss, accuracy
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {stages.map((stage) => (
            <tr key={stage}>
              <th scope="row">{stage}</th>
              {runs.map((run) => {
                const scores = Object.fromEntries(stagesOf(run))[stage];
                return (
                  <td key={run.id} class="right num">
                    {scores ? `${scores.loss === undefined ? "–" : decimals(scores.loss)}, ${scores.accuracy === undefined ? "–" : percent(scores.accuracy, 1)}` : "–"}
                  </td>
                );
              })}
            </tr>
          ))}
        </tbody>
      </table>
    </Scroll>
  );
}

function SettingsTable({ runs }: { runs: Run[] }) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))].sort();
  if (names.length === 0) return null;
  return (
    <details>
      <summary>Settings</summary>
      <Scroll label="Settings">
        <table>
          <thead>
            <tr>
              <th scope="col">Setting</th>
              {runs.map((run) => (
                <th key={run.id} scope="col">
                  {nameOf(run, runs)}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {names.map((name) => {
              const values = runs.map((run) => (name in run.settings ? settingText(run.settings[name]) : "–"));
              return (
                <tr key={name}>
                  <th scope="row">{name.replaceAll("_", " ")}</th>
                  {values.map((value, index) => (
                    <td key={runs[index]!.id} class="any">
                      {value !== values[0] ? <b>{value}</b> : value}
                    </td>
                  ))}
                </tr>
              );
            })}
          </tbody>
        </table>
      </Scroll>
    </details>
  );
}
