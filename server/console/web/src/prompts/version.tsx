// What one version is.
import type { ComponentChildren } from "preact";
import { call, path } from "../api/client";
import type { Prompt, Version } from "../api/types";
import { bytes, count, date, decimals, method } from "../ui/format";
import { useLoad } from "../ui/load";
import { Button, Card, Chip } from "../ui/parts";
import { tiersText } from "./residency";

interface Props {
  prompt: Prompt;
  version: Version;
  onPromote: () => void;
  onDelete: () => void;
}

export function VersionCard({ prompt, version, onPromote, onDelete }: Props) {
  const isLatest = prompt.aliases.latest === version.version;
  return (
    <Card
      title={`Version ${version.version}`}
      side={
        <span class="row">
          <Button small needs="prompts:write" onClick={onDelete}>
            Delete version
          </Button>
          <Button small kind="primary" needs="prompts:write" blocked={isLatest && Object.keys(prompt.aliases).length === 1 && prompt.num_versions === 1 ? "It is the only version." : undefined} onClick={onPromote}>
            Promote
          </Button>
        </span>
      }
    >
      <div class="pad stack">
        <dl>
          {rows(version).map(([term, value]) => (
            <>
              <dt>{term}</dt>
              <dd>{value}</dd>
            </>
          ))}
        </dl>
        <Config version={version} />
      </div>
    </Card>
  );
}

function rows(version: Version): [string, ComponentChildren][] {
  const found: [string, ComponentChildren][] = [
    ["Method", `${method(version.peft_type)}, ${version.task_type === "SEQ_CLS" ? "classification" : "generation"}`],
    version.kind === "adapter" ? ["Rank", `${version.rank}, ${count(version.num_parameters ?? 0)} parameters`] : ["Virtual tokens", count(version.num_virtual_tokens)],
    ["Tensors", version.dtype],
    ["Base model", version.base_model_name_or_path ?? "not named"],
    ["Published", [date(version.created_at), version.created_by && ` by ${version.created_by}`]],
    ["Seen by", version.shared ? "all tenants" : version.owner],
  ];
  if (version.residency) found.push(["Residency", tiersText(version.residency)]);
  if (version.tags.length > 0) found.push(["Tags", <span class="row">{version.tags.map((tag) => <Chip key={tag}>{tag}</Chip>)}</span>]);
  if (version.description) found.push(["Description", version.description]);
  for (const [key, value] of Object.entries(flattened({ ...version.lineage, ...version.metadata }))) found.push([key, shown(value)]);
  if (version.format) found.push(["Format", <code>{JSON.stringify(version.format)}</code>]);
  found.push(["Digest", <code>{version.digest.slice(0, 16)}</code>]);
  found.push([
    "Files",
    <span class="row">
      {version.files.map((file) => (
        <a key={file.filename} href={path`/v1/prompts/${version.id}/versions/${version.version}/files/${file.filename}`} download={file.filename}>
          {file.filename} ({bytes(file.size)})
        </a>
      ))}
    </span>,
  ]);
  return found;
}

/** Nested objects as one, with dots in its keys. */
export function flattened(value: Record<string, unknown>, prefix = ""): Record<string, unknown> {
  return Object.fromEntries(
    Object.entries(value).flatMap(([key, inner]) =>
      inner && typeof inner === "object" && !Array.isArray(inner)
        ? Object.entries(flattened(inner as Record<string, unknown>, `${prefix}${key}.`))
        : [[`${prefix}${key}`, inner]],
    ),
  );
}

export function shown(value: unknown): string {
  if (typeof value === "number") return decimals(value, 5);
  return typeof value === "string" ? value : JSON.stringify(value);
}

function Config({ version }: { version: Version }) {
  const { id, version: number } = version;
  const { data } = useLoad(`${id}@${number}`, (signal) => call<unknown>("GET", path`/v1/prompts/${id}/versions/${number}/files/adapter_config.json`, undefined, signal));
  return (
    <details>
      <summary>adapter_config.json</summary>
      <pre>{data === undefined ? "Loading …" : JSON.stringify(data, null, 2)}</pre>
    </details>
  );
}
