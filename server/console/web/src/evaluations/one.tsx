// One evaluation, alone or beside another one on the same data, and from there to a promotion.
import { useEffect, useState } from "preact/hooks";
import { call, path, query } from "../api/client";
import type { Evaluation, EvaluationComparison, EvaluationPage } from "../api/types";
import { go, href, setParams } from "../app/router";
import { returns } from "../app/server";
import { PromoteFrom } from "../prompts/promote_from";
import { ago, count, date, plural } from "../ui/format";
import { useLoad } from "../ui/load";
import { Button, Card, Chip, ErrorNote, Loading } from "../ui/parts";
import { report, reportError } from "../ui/toast";
import { dataText, isOver, metricText, points, rowsText, scoreKind, scoreText, titleOf, verdict } from "./model";
import { DifferingRows, WrongRows } from "./rows";
import { Intervals, Labels, Matrix } from "./scores";

const SHOWN_ROWS = 100;
const RELOAD_MS = 10_000;

export function EvaluationCard({ id, to, heard, onGone }: { id: string; to: string | null; heard: Evaluation | undefined; onGone: () => void }) {
  // Read again when it ends: only then there are scores by label.
  const key = `${id} ${returns.value} ${heard && isOver(heard) ? heard.status : ""}`;
  const { data, error, reload } = useLoad(key, (signal) => call<Evaluation>("GET", path`/v1/evaluations/${id}`, undefined, signal));
  const [isPromoting, setPromoting] = useState(false);
  const isWaiting = data !== undefined && !isOver(data);
  useEffect(() => {
    // It may have ended between the first look and the first event.
    if (!isWaiting) return undefined;
    const timer = setInterval(reload, RELOAD_MS);
    return () => clearInterval(timer);
  }, [isWaiting]);
  if (error) return <ErrorNote error={error} retry={reload} />;
  if (!data) return <Loading />;
  const one = heard && !isOver(heard) && !isOver(data) ? { ...data, status: heard.status, rows: heard.rows } : data;

  async function cancel() {
    try {
      await call("POST", path`/v1/evaluations/${id}/cancel`);
      reload();
    } catch (failure) {
      reportError(failure);
    }
  }

  async function remove() {
    try {
      await call("DELETE", path`/v1/evaluations/${id}`);
      report("The evaluation is deleted.");
      go(href(["evaluations"]));
      onGone();
    } catch (failure) {
      reportError(failure);
    }
  }

  return (
    <Card
      title={`${titleOf(one)} on ${one.dataset || "unnamed data"}`}
      side={
        <>
          {one.prompt_id && one.version !== null && one.status === "completed" && (
            <Button kind="primary" needs="prompts:write" onClick={() => setPromoting(true)}>
              Promote version {one.version}
            </Button>
          )}
          {isOver(one) ? (
            <Button needs="generate" onClick={() => void remove()}>
              Delete
            </Button>
          ) : (
            <Button needs="generate" blocked={one.status === "cancelling" ? "It is being cancelled." : undefined} onClick={() => void cancel()}>
              Cancel
            </Button>
          )}
        </>
      }
    >
      <div class="pad stack">
        <p class="dim">
          <Chip kind={scoreKind(one)}>{one.status.replace("_", " ")}</Chip> {one.name && <>“{one.name}”, </>}
          {dataText(one)}, {metricText(one)}, {one.source === "server" ? "answered here" : "recorded by a client"}, <span title={date(one.created_at)}>{ago(one.created_at)}</span>
        </p>
        {one.error && (
          <p class="note bad" role="alert">
            {one.error}
          </p>
        )}
        {!isOver(one) && (
          <div>
            <progress max={one.rows.total} value={one.rows.answered} aria-label="Answered rows" />
            <p class="dim" role="status">
              {count(one.rows.answered)} of {plural(one.rows.total, "row")} answered, {count(one.rows.right)} right. The rows are sent in the service tier “batch”, in what interactive requests leave.
            </p>
          </div>
        )}
        {one.scores && <Scored one={one} to={to} />}
      </div>
      {isPromoting && one.prompt_id && one.version !== null && <PromoteFrom name={one.prompt_id} version={one.version} onClose={() => setPromoting(false)} />}
    </Card>
  );
}

function Scored({ one, to }: { one: Evaluation; to: string | null }) {
  const others = useLoad(`${one.dataset_digest} ${returns.value}`, (signal) =>
    call<EvaluationPage>("GET", `/v1/evaluations${query({ dataset_digest: one.dataset_digest, status: "completed", limit: 200 })}`, undefined, signal),
  );
  const options = (others.data?.data ?? []).filter((other) => other.id !== one.id);
  const isKnown = options.some((other) => other.id === to);
  return (
    <>
      {others.error && <ErrorNote error={others.error} retry={others.reload} />}
      {options.length > 0 && (
        <label class="field">
          <span class="label">Compare with</span>
          <select value={isKnown ? to! : ""} onChange={(event) => setParams({ to: event.currentTarget.value || null })}>
            <option value="">nothing</option>
            {options.map((other) => (
              <option key={other.id} value={other.id}>
                {titleOf(other)}, {scoreText(other)}, {ago(other.created_at)}
              </option>
            ))}
          </select>
        </label>
      )}
      {others.data && options.length === 0 && <p class="dim3">Evaluate another version on the same data to compare the two row by row.</p>}
      {to && to !== one.id ? <Compared id={one.id} to={to} /> : <Alone one={one} />}
    </>
  );
}

function Alone({ one }: { one: Evaluation }) {
  return (
    <>
      <Intervals evaluations={[one]} />
      <p>{rowsText(one)}.</p>
      <Matrix evaluation={one} />
      <Labels evaluations={[one]} />
      <WrongRows key={one.id} evaluation={one} />
    </>
  );
}

function Compared({ id, to }: { id: string; to: string }) {
  const { data, error, reload } = useLoad(`${id} ${to} ${returns.value}`, (signal) =>
    call<EvaluationComparison>("GET", path`/v1/evaluations/${id}/comparison` + query({ to, limit: SHOWN_ROWS }), undefined, signal),
  );
  if (error) return <ErrorNote error={error} retry={reload} />;
  if (!data) return <Loading />;
  const { first, second } = data;
  const [low, high] = data.interval;
  return (
    <>
      <Intervals evaluations={[first, second]} />
      <p>
        <Chip kind={data.p_value < 0.05 ? (data.difference > 0 ? "ok" : "bad") : ""}>{points(data.difference)} points</Chip> {verdict(titleOf(first), data.difference, data.p_value)} The 95% interval of the difference is {points(low)} to {points(high)} points (bootstrap over rows).
      </p>
      <p class="dim">
        Only {titleOf(first)} is right on {count(data.only_first)} rows, only {titleOf(second)} on {count(data.only_second)}; both on {count(data.both_right)}, neither on {count(data.both_wrong)}.
      </p>
      <div class="matrices">
        <Matrix evaluation={first} />
        <Matrix evaluation={second} />
      </div>
      <Labels evaluations={[first, second]} />
      <DifferingRows comparison={data} />
    </>
  );
}
