// What differs between two versions, and whom a move from one to the other meets.
import { call, path, query } from "../api/client";
import type { Diff } from "../api/types";
import { colourOf } from "../ui/colours";
import { decimals, plural } from "../ui/format";
import { useLoad } from "../ui/load";
import { Card, Chip, ErrorNote, Loading, Scroll } from "../ui/parts";
import { shown } from "./version";

interface Props {
  name: string;
  from: number;
  to: number;
}

const useDiff = ({ name, from, to }: Props) =>
  useLoad(`${name} ${from} ${to}`, (signal) => call<Diff>("GET", path`/v1/prompts/${name}/diff` + query({ from, to }), undefined, signal));

type Row = [field: string, before: unknown, after: unknown];

function rowsOf(diff: Diff): Row[] {
  const fields = [...diff.metadata, ...diff.lineage, ...diff.configuration];
  const length: Row[] = diff.before.num_virtual_tokens === diff.after.num_virtual_tokens ? [] : [["virtual tokens", diff.before.num_virtual_tokens, diff.after.num_virtual_tokens]];
  return [...length, ...fields.map(({ field, before, after }): Row => [field.replace(/^metadata\./, ""), before, after])];
}

const text = (value: unknown): string => (value === undefined || value === null || value === "" || (Array.isArray(value) && value.length === 0) ? "—" : Array.isArray(value) ? value.map(shown).join(", ") : shown(value));

function DiffTable({ diff }: { diff: Diff }) {
  const rows = rowsOf(diff);
  if (diff.same_files && rows.length === 0) return <p class="pad dim">Both have the same files, and nothing else differs.</p>;
  if (rows.length === 0) return <p class="pad dim">No field differs; the tensors do.</p>;
  return (
    <table class="diff">
      <thead>
        <tr>
          <th scope="col">Field</th>
          <th scope="col">version {diff.before.version}</th>
          <th scope="col">version {diff.after.version}</th>
        </tr>
      </thead>
      <tbody>
        {rows.map(([field, was, is]) => (
          <tr key={field}>
            <th scope="row">
              <code>{field}</code>
            </th>
            <td class="was">{text(was)}</td>
            <td class="now">{text(is)}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

const MAX_BARS = 256;

/** How far each virtual token has moved: one minus the cosine of its rows in both versions. */
function Moved({ diff, label }: { diff: Diff; label: string }) {
  const tokens = diff.tokens ?? [];
  if (diff.same_files || tokens.length === 0) return null;
  const { class: kind, style } = colourOf(diff.after.id);
  const mean = tokens.reduce((sum, token) => sum + token.cosine, 0) / tokens.length;
  const furthest = tokens.reduce((one, other) => (other.cosine < one.cosine ? other : one));
  return (
    <div class="pad stack">
      <p class="dim">
        {plural(tokens.length, "virtual token")} in both; cosine {decimals(mean)} on average. Token {furthest.index} differs most: cosine {decimals(furthest.cosine)}, norm {decimals(furthest.norm_before, 2)} → {decimals(furthest.norm_after, 2)}. The higher a bar, the further the token has moved.
      </p>
      <Scroll label={label}>
        <div class={`strip wraps ${kind}`} style={style} role="list">
          {tokens.slice(0, MAX_BARS).map((token) => (
            <div key={token.index} class="vt" role="listitem" title={`token ${token.index}: cosine ${decimals(token.cosine)}, norm ${decimals(token.norm_before, 2)} → ${decimals(token.norm_after, 2)}`}>
              <span class="h">
                <i style={{ height: `${Math.min(100, Math.max(2, (1 - token.cosine) * 100))}%` }} />
              </span>
              <small class="num">{token.cosine.toFixed(2)}</small>
            </div>
          ))}
        </div>
      </Scroll>
      {tokens[0]?.layers && <Layers diff={diff} label={`${label}, by layer`} />}
    </div>
  );
}

/** Mean cosines of keys and values by layer. */
function Layers({ diff: { tokens }, label }: { diff: Diff; label: string }) {
  const rows = tokens ?? [];
  const mean = (layer: number, part: "keys" | "values") => rows.reduce((sum, token) => sum + (token.layers?.[layer]?.[part].cosine ?? 0), 0) / rows.length;
  return (
    <Scroll label={label}>
      <table>
        <thead>
          <tr>
            <th scope="col">Layer</th>
            <th scope="col" class="right">Keys, mean cosine</th>
            <th scope="col" class="right">Values, mean cosine</th>
          </tr>
        </thead>
        <tbody>
          {rows[0]!.layers!.map((_, layer) => (
            <tr key={layer}>
              <th scope="row" class="num">{layer}</th>
              <td class="right num">{mean(layer, "keys").toFixed(3)}</td>
              <td class="right num">{mean(layer, "values").toFixed(3)}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </Scroll>
  );
}

/** In a dialog: whom the move meets, and what differs. */
export function Consequence(props: Props) {
  const { data, error, reload } = useDiff(props);
  if (error) return <ErrorNote error={error} retry={reload} />;
  if (!data) return <Loading />;
  const { before, after } = data;
  return (
    <>
      <p class="dim">
        In the last hour, this server has answered {plural(before.requests_last_hour, "request")} with version {before.version} and {after.requests_last_hour} with version {after.version}; now it answers {before.running} and {after.running}.
      </p>
      <DiffTable diff={data} />
      <Moved diff={data} label="Virtual tokens that this changes" />
    </>
  );
}

export function DiffCard(props: Props) {
  const { data, error, reload } = useDiff(props);
  const isSameShape = data && data.before.num_virtual_tokens === data.after.num_virtual_tokens;
  return (
    <Card
      title={`What changes: ${props.from} → ${props.to}`}
      side={data && (data.same_files ? <Chip kind="ok">same files</Chip> : isSameShape ? <Chip kind="ok">same length</Chip> : <Chip kind="warn">another length</Chip>)}
    >
      {error && <ErrorNote error={error} retry={reload} />}
      {!data && !error && <Loading />}
      {data && <DiffTable diff={data} />}
      {data && <Moved diff={data} label="How far each virtual token has moved" />}
    </Card>
  );
}
