// How probable each label is.
import { ApiError } from "../api/client";
import { visible } from "../prompts/inspect";
import { colourOf } from "../ui/colours";
import { percent } from "../ui/format";
import { Chip, ErrorNote, Loading } from "../ui/parts";
import { nameOf } from "./answer";
import type { Classified } from "./run";

export function LabelsCard({ member, base, result }: { member: string; base: string; result: Classified | ApiError | null }) {
  const { class: kind, style } = colourOf(nameOf(member, base));
  return (
    <section class={`card variant ${kind}`} style={style} aria-label={`Labels by ${member}`}>
      <header>
        <i class="sw" aria-hidden="true" />
        <h2>{member}</h2>
        <span class="grow" />
        {result && !(result instanceof ApiError) && <Chip kind="ok">{visible(result.label)}</Chip>}
      </header>
      {result === null && <Loading />}
      {result instanceof ApiError && <ErrorNote error={result} />}
      {result && !(result instanceof ApiError) && (
        <div class="alts">
          <table>
            <thead class="hidden">
              <tr>
                <th scope="col">Label</th>
                <th scope="col">Probability</th>
              </tr>
            </thead>
            <tbody>
              {Object.entries(result.probabilities).map(([label, probability]) => (
                <tr key={label}>
                  <th scope="row">
                    <code>{visible(label)}</code>
                  </th>
                  <td>
                    <span class="share" aria-hidden="true">
                      <i class={label === result.label ? "" : "other"} style={{ width: `${probability * 100}%` }} />
                    </span>
                    <span class="num">{percent(probability, 1)}</span>
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
    </section>
  );
}
