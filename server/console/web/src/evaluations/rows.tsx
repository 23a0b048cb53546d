// The rows of one evaluation that were answered wrong, or those that only one of two answers correctly.
import { useState } from "preact/hooks";
import { call, path, query } from "../api/client";
import type { Evaluation, EvaluationComparison, EvaluationRows } from "../api/types";
import { count } from "../ui/format";
import { useLoad } from "../ui/load";
import { Button, Chip, ErrorNote, Loading, Scroll } from "../ui/parts";
import { titleOf } from "./model";

const PAGE_SIZE = 50;

/** What a row asks, without the JSON around it. */
function textOf(source: string | null): string {
  if (!source) return "";
  try {
    const row = JSON.parse(source);
    return row.text ?? row.prompt ?? row.messages?.at(-2)?.content ?? source;
  } catch {
    return source;
  }
}

export function WrongRows({ evaluation }: { evaluation: Evaluation }) {
  const [outcome, setOutcome] = useState<"wrong" | "error">(evaluation.rows.errors > 0 && evaluation.rows.right + evaluation.rows.errors === evaluation.rows.answered ? "error" : "wrong");
  const key = `${evaluation.id} ${outcome}`;
  const read = (after: number | null, signal?: AbortSignal) =>
    call<EvaluationRows>("GET", path`/v1/evaluations/${evaluation.id}/rows` + query({ outcome, limit: PAGE_SIZE, after }), undefined, signal);
  const { data, error, reload } = useLoad(key, (signal) => read(null, signal));
  const [more, setMore] = useState<{ key: string; pages: EvaluationRows[] }>({ key, pages: [] });
  const pages = [...(data ? [data] : []), ...(more.key === key ? more.pages : [])];
  const rows = pages.flatMap((page) => page.data);
  const last = pages.at(-1);
  return (
    <section class="stack">
      <h3>
        Rows that are not right
        {evaluation.rows.errors > 0 && (
          <>
            {" "}
            <Button small pressed={outcome === "error"} onClick={() => setOutcome(outcome === "error" ? "wrong" : "error")}>
              Only those without an answer
            </Button>
          </>
        )}
      </h3>
      {error && <ErrorNote error={error} retry={reload} />}
      {!data && !error && <Loading />}
      {data && rows.length === 0 && <p class="dim">None.</p>}
      {rows.length > 0 && (
        <Scroll label="Rows that are not right">
          <table>
            <thead>
              <tr>
                <th scope="col">Line</th>
                {evaluation.keep_texts && <th scope="col">Text</th>}
                <th scope="col">Expected</th>
                <th scope="col">Answer</th>
              </tr>
            </thead>
            <tbody>
              {rows.map((row) => (
                <tr key={row.row}>
                  <td class="num">{row.line}</td>
                  {evaluation.keep_texts && <td class="any">{textOf(row.text)}</td>}
                  <td class="any">{row.expected ?? <span class="dim3">not kept</span>}</td>
                  <td class="any">{row.error ? <span class="bad">{row.error}</span> : (row.answer ?? <span class="dim3">not kept</span>)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </Scroll>
      )}
      {last?.has_more && (
        <div>
          <Button onClick={() => void read(last.last_row).then((page) => setMore({ key, pages: [...pages.slice(1), page] }))}>Show more rows</Button>
        </div>
      )}
    </section>
  );
}

export function DifferingRows({ comparison }: { comparison: EvaluationComparison }) {
  const { first, second, data } = comparison;
  const hasText = data.some((row) => row.text);
  const answer = (text: string | null, isRight: boolean) => <Chip kind={isRight ? "ok" : "bad"}>{text ?? (isRight ? "right" : "wrong")}</Chip>;
  return (
    <section class="stack">
      <h3>Rows that only one answers correctly</h3>
      {data.length === 0 && <p class="dim">None.</p>}
      {data.length > 0 && (
        <Scroll label="Rows that only one answers correctly">
          <table>
            <thead>
              <tr>
                <th scope="col">Line</th>
                {hasText && <th scope="col">Text</th>}
                <th scope="col">Expected</th>
                <th scope="col">{titleOf(first)}</th>
                <th scope="col">{titleOf(second)}</th>
              </tr>
            </thead>
            <tbody>
              {data.map((row) => (
                <tr key={row.row}>
                  <td class="num">{row.line}</td>
                  {hasText && <td class="any">{textOf(row.text)}</td>}
                  <td class="any">{row.expected ?? <span class="dim3">not kept</span>}</td>
                  <td>{answer(row.first_answer, row.right === "first")}</td>
                  <td>{answer(row.second_answer, row.right === "second")}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </Scroll>
      )}
      {comparison.has_more && <p class="dim3">The first {count(data.length)} of {count(comparison.only_first + comparison.only_second)}.</p>}
    </section>
  );
}
