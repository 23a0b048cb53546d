// The scores of one evaluation, or of two side by side: intervals, confusion matrices, labels.
import type { Evaluation } from "../api/types";
import { colourOf } from "../ui/colours";
import { count, decimals, percent } from "../ui/format";
import { Scroll } from "../ui/parts";
import { titleOf } from "./model";

/** Accuracies with their 95% intervals on one scale. */
export function Intervals({ evaluations }: { evaluations: Evaluation[] }) {
  const scored = evaluations.flatMap((one) => (one.scores ? [{ one, scores: one.scores }] : []));
  const low = Math.max(0, Math.min(...scored.map(({ scores }) => scores.interval[0])) - 0.02);
  const high = Math.min(1, Math.max(...scored.map(({ scores }) => scores.interval[1])) + 0.02);
  const place = (value: number) => `${((100 * (value - low)) / (high - low)).toFixed(2)}%`;
  return (
    <div class="intervals">
      {scored.map(({ one, scores }) => {
        const { class: kind, style } = colourOf(one.prompt_id);
        const [from, to] = scores.interval;
        return (
          <div key={one.id} class={`interval ${kind}`} style={style}>
            <span class="any">{titleOf(one)}</span>
            <span class="track" aria-hidden="true">
              <i class="range" style={{ left: place(from), right: `calc(100% - ${place(to)})` }} />
              <i class="point" style={{ left: place(scores.accuracy) }} />
            </span>
            <span class="num">
              <b>{percent(scores.accuracy, 1)}</b> <small class="dim3">{percent(from, 1)} to {percent(to, 1)}</small>
            </span>
          </div>
        );
      })}
      <small class="dim3">
        Share of right answers with its 95% confidence interval, on a scale from {percent(low, 1)} to {percent(high, 1)}.
      </small>
    </div>
  );
}

/** A confusion matrix: labels by row, answers by column. */
export function Matrix({ evaluation }: { evaluation: Evaluation }) {
  const confusion = evaluation.scores?.confusion;
  if (!confusion) return null;
  const hasOther = confusion.counts.some((row) => row.at(-1)! > 0);
  const columns = hasOther ? confusion.labels : confusion.labels.slice(0, -1);
  return (
    <Scroll label={`Confusion matrix of ${titleOf(evaluation)}`}>
      <table class="matrix">
        <caption class="dim">{titleOf(evaluation)}: label by row, answer by column</caption>
        <thead>
          <tr>
            <td />
            {columns.map((label) => (
              <th key={label} scope="col">{label}</th>
            ))}
          </tr>
        </thead>
        <tbody>
          {confusion.counts.map((row, index) => {
            const most = Math.max(1, row.reduce((sum, value) => sum + value, 0));
            return (
              <tr key={confusion.labels[index]}>
                <th scope="row">{confusion.labels[index]}</th>
                {row.slice(0, columns.length).map((value, column) => (
                  <td key={columns[column]} class={column === index ? "hit" : "miss"} style={{ "--w": `${Math.round((34 * value) / most)}%` }}>
                    {count(value)}
                  </td>
                ))}
              </tr>
            );
          })}
        </tbody>
      </table>
    </Scroll>
  );
}

/** Precision, recall and F1 of each label. */
export function Labels({ evaluations }: { evaluations: Evaluation[] }) {
  const [first] = evaluations;
  const labels = first?.scores?.labels;
  if (!labels) return null;
  return (
    <details>
      <summary>Scores by label</summary>
      <Scroll label="Scores by label">
        <table>
          <thead>
            <tr>
              <th scope="col">Label</th>
              <th scope="col" class="right">Rows</th>
              {evaluations.map((one) => (
                <th key={one.id} scope="col" class="right">{titleOf(one)}: F1, precision, recall</th>
              ))}
            </tr>
          </thead>
          <tbody>
            {Object.entries(labels).map(([label, { support }]) => (
              <tr key={label}>
                <th scope="row">{label}</th>
                <td class="right num">{count(support)}</td>
                {evaluations.map((one) => {
                  const own = one.scores?.labels?.[label];
                  return (
                    <td key={one.id} class="right num">{own ? `${decimals(own.f1)}, ${decimals(own.precision)}, ${decimals(own.recall)}` : "–"}</td>
                  );
                })}
              </tr>
            ))}
          </tbody>
        </table>
      </Scroll>
    </details>
  );
}
