// The running batch: a row a sequence, and each soft prompt's blocks once beside all rows that read them.
import { colourOf } from "../ui/colours";
import { count, duration, plural } from "../ui/format";
import { Chip, Empty, Scroll, Swatch } from "../ui/parts";
import { colourName, type Engine, type Group, groupsOf, nameOf, parts, type Row } from "./model";

const MAX_CELLS = 48;
const MAX_WIDTH = 160;

export function BatchPicture({ engine }: { engine: Engine }) {
  const groups = groupsOf(engine);
  const { size } = engine.blocks;
  const longest = Math.max(1, ...groups.flatMap((group) => group.rows.map((row) => row.blocks.shared + row.blocks.own)));
  const perCell = Math.ceil(longest / MAX_CELLS);
  if (groups.length === 0)
    return (
      <Empty title="Nothing runs now.">
        <p>Send a request, or ask in the playground: each sequence becomes a row.</p>
      </Empty>
    );
  return (
    <div class="pad stack">
      <Legend />
      <div class="batch">
        {groups.map((group) => (
          <GroupRows key={group.key} group={group} size={size} perCell={perCell} />
        ))}
      </div>
      <p class="dim3">
        A row is a sequence, a cell {perCell === 1 ? "a block" : plural(perCell, "block")} of {size} tokens. In a step each decoding row gets one token, whatever stands before its text.
      </p>
    </div>
  );
}

const KINDS: [string, string][] = [
  ["k", "soft prompt, one copy for all rows beside it"],
  ["t", "text that other rows share"],
  ["p", "text"],
  ["g", "generated"],
];

function Legend() {
  return (
    <div class="legend sp base" aria-hidden="true">
      {KINDS.map(([kind, words]) => (
        <span key={kind}>
          <i class={`cell ${kind}`} /> {words}
        </span>
      ))}
    </div>
  );
}

function GroupRows({ group, size, perCell }: { group: Group; size: number; perCell: number }) {
  const { resident, rows, names } = group;
  const { class: kind, style } = colourOf(colourName((resident && names[0]) ?? null));
  const label = !group.isMine ? "other tenants" : resident ? names.join(", ") || resident.name || "soft prompt" : "base model, no soft prompt";
  const copy = resident && `${plural(resident.blocks, "block")}, one copy for ${plural(rows.length, "row")}`;
  return (
    <div class={`group ${kind}`} style={style} role="group" aria-label={`${label}: ${plural(rows.length, "row")}`}>
      <div class="names">
        {rows.map((row, index) => (
          <span key={index} class="line">
            <Swatch name={colourName(row.name)} />
            <b class="cut">{nameOf(row)}</b>
          </span>
        ))}
      </div>
      {resident && copy ? (
        <div class="shared" style={{ width: `${Math.min(MAX_WIDTH, 14 + resident.blocks * 10)}px` }} role="img" aria-label={`${label}: ${copy}`} title={copy}>
          <span>{count(resident.blocks)}</span>
        </div>
      ) : (
        <div />
      )}
      <div>
        {rows.map((row, index) => (
          <Cells key={index} row={row} size={size} perCell={perCell} />
        ))}
      </div>
      <div class="facts num">
        {rows.map((row, index) => (
          <span key={index} class="line">
            {row.phase === "prefill" ? <Chip>prefill</Chip> : `${count(row.new_tokens)} new`} · {duration(row.age_seconds)}
          </span>
        ))}
      </div>
    </div>
  );
}

function Cells({ row, size, perCell }: { row: Row; size: number; perCell: number }) {
  const { shared, text, generated } = parts(row, size);
  const cells = (kind: string, blocks: number) => Array.from({ length: Math.ceil(blocks / perCell) }, (_, index) => <i key={`${kind}${index}`} class={`cell ${kind}`} />);
  return (
    <span class="line" role="img" aria-label={`${shared} shared, ${text} text, ${generated} generated blocks`}>
      {cells("t", shared)}
      {cells("p", text)}
      {cells("g", generated)}
    </span>
  );
}

export function BatchTable({ engine }: { engine: Engine }) {
  return (
    <Scroll label="Sequences">
      <table>
        <thead>
          <tr>
            <th scope="col">Soft prompt</th>
            <th scope="col">Phase</th>
            <th scope="col" class="right">Virtual</th>
            <th scope="col" class="right">Text</th>
            <th scope="col" class="right">New</th>
            <th scope="col" class="right">Blocks: soft prompt, shared, own</th>
            <th scope="col" class="right">Age</th>
          </tr>
        </thead>
        <tbody>
          {engine.rows.map((row, index) => (
            <tr key={index}>
              <th scope="row">
                <span class="row">
                  <Swatch name={colourName(row.name)} /> {nameOf(row)}
                </span>
              </th>
              <td>{row.phase}</td>
              <td class="right num">{count(row.virtual_tokens)}</td>
              <td class="right num">{count(row.text_tokens)}</td>
              <td class="right num">{count(row.new_tokens)}</td>
              <td class="right num">
                {row.blocks.soft_prompt}, {row.blocks.shared}, {row.blocks.own}
              </td>
              <td class="right num">{duration(row.age_seconds)}</td>
            </tr>
          ))}
        </tbody>
      </table>
      {engine.rows.length === 0 && <Empty title="Nothing runs now." />}
    </Scroll>
  );
}
