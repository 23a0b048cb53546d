// Upload: files first, which are checked at once; then a name.
import { useRef, useState } from "preact/hooks";
import { ApiError, type Fault } from "../api/client";
import type { DryRun } from "../api/types";
import { go, href, route } from "../app/router";
import { lacking } from "../app/session";
import { bytes, method, plural } from "../ui/format";
import { Button, Card, Chip, Field } from "../ui/parts";
import { report, reportError } from "../ui/toast";
import { dropped, FILES, send, tryOut } from "./upload_request";

const TEXTS = [
  ["alias", "Alias", "The alias to move to the new version; latest if empty."],
  ["description", "Description", ""],
  ["tags", "Tags", "Separated by commas."],
  ["metadata", "Metadata", "A JSON object."],
] as const;

/** Whether a fault belongs to a text field of the form. */
const isOfField = (fault: Fault) => !fault.file && Boolean(fault.param ?? fault.field) && (fault.param ?? fault.field) !== "files";

export function UploadPage() {
  const [files, setFiles] = useState<File[]>([]);
  const [ignored, setIgnored] = useState<string[]>([]);
  const [fields, setFields] = useState<Record<string, string>>({ id: route.value.params.get("id") ?? "" });
  const [faults, setFaults] = useState<Fault[]>([]);
  const [checked, setChecked] = useState<DryRun>();
  const [progress, setProgress] = useState<number | null>(null);
  const missing = FILES.filter((name) => !files.some((file) => file.name === name));

  async function run<T>(sending: Promise<T>): Promise<T | undefined> {
    setProgress(0);
    setFaults([]);
    try {
      return await sending;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      setFaults(error.faults);
      return undefined;
    } finally {
      setProgress(null);
    }
  }

  function take(found: File[]) {
    const known = found.filter((file) => (FILES as readonly string[]).includes(file.name));
    setIgnored(found.filter((file) => !known.includes(file)).map((file) => file.name));
    const next = [...files.filter((file) => !known.some((one) => one.name === file.name)), ...known];
    setFiles(next);
    setChecked(undefined);
    setFaults([]);
    if (FILES.every((name) => next.some((file) => file.name === name))) void check(next, fields);
  }

  async function check(list: File[], texts: Record<string, string>) {
    // The files are checked before there is a name; a dry run stores nothing.
    setChecked(await run(tryOut({ files: list, fields: texts, onProgress: setProgress })));
  }

  async function upload(event: Event) {
    event.preventDefault();
    const result = await run(send({ files, fields, onProgress: setProgress }));
    if (!result) return;
    const { version, isNew } = result;
    report(isNew ? `${version.id}@${version.version} is stored.` : `The same files are there already, as ${version.id}@${version.version}.`);
    go(href(["prompts", version.id], { version: version.version }));
  }

  const set = (name: string) => (value: string) => setFields({ ...fields, [name]: value });
  const faultOf = (name: string) => faults.find((fault) => isOfField(fault) && (fault.param ?? fault.field) === name)?.message;
  const fileFaults = faults.filter((fault) => !isOfField(fault) || !["id", ...TEXTS.map(([name]) => name)].includes(String(fault.param ?? fault.field)));

  return (
    <>
      <div class="title">
        <a class="btn quiet only" href={href(["prompts"])} aria-label="All soft prompts" title="All soft prompts">
          ←
        </a>
        <h1>Upload</h1>
      </div>
      {lacking("prompts:write") && <p class="note warn">This key lacks the scope prompts:write, so it cannot upload.</p>}
      <form class="cols two" onSubmit={upload}>
        <Card title="Files" side={<Outcome faults={faults} checked={checked} />}>
          <div class="pad stack">
            <DropZone onFiles={take} />
            {FILES.map((name) => (
              <FileRow key={name} name={name} file={files.find((file) => file.name === name)} />
            ))}
            {ignored.length > 0 && <p class="dim3 any">Not needed, and not sent: {ignored.join(", ")}.</p>}
            {progress !== null && (
              <div>
                <progress value={progress} max={1} aria-label="Sent" />
                <small class="dim3">{progress < 1 ? "Sending …" : "The server checks the files …"}</small>
              </div>
            )}
            <div role="status">
              {checked && <Checked version={checked} />}
              {fileFaults.length > 0 && <Faults faults={fileFaults} />}
            </div>
          </div>
        </Card>
        <Card title="About the version">
          <div class="pad stack">
            <Field label="Name" value={fields.id ?? ""} onInput={set("id")} fault={faultOf("id")} hint="Lower-case letters, digits, '.', '_' and '-'. A name that exists gets a new version." />
            {TEXTS.map(([name, label, hint]) => (
              <Field key={name} label={label} value={fields[name] ?? ""} onInput={set(name)} fault={faultOf(name)} hint={hint} />
            ))}
            <label class="check">
              <input type="checkbox" checked={fields.allow_other_base === "true"} onChange={(event) => set("allow_other_base")(event.currentTarget.checked ? "true" : "")} />
              The files name the same base model by another name
            </label>
            <span class="row">
              <Button kind="primary" icon="upload" submit needs="prompts:write" blocked={blocked(missing, fields.id ?? "", progress)}>
                Upload
              </Button>
              <Button blocked={missing.length > 0 ? `Missing: ${missing.join(", ")}.` : undefined} needs="prompts:write" onClick={() => void check(files, fields).catch(reportError)}>
                Check only
              </Button>
            </span>
          </div>
        </Card>
      </form>
    </>
  );
}

function blocked(missing: string[], id: string, progress: number | null): string | undefined {
  if (progress !== null) return "The files are being sent.";
  if (missing.length > 0) return `Missing: ${missing.join(", ")}.`;
  return id ? undefined : "The name is missing.";
}

function Outcome({ faults, checked }: { faults: Fault[]; checked: DryRun | undefined }) {
  if (faults.length > 0) return <Chip kind="bad">{faults.length === 1 ? "1 fault" : `${faults.length} faults`}, nothing was stored</Chip>;
  return checked ? <Chip kind="ok">no faults</Chip> : null;
}

function DropZone({ onFiles }: { onFiles: (files: File[]) => void }) {
  const [isOver, setOver] = useState(false);
  const input = useRef<HTMLInputElement>(null);
  return (
    <div
      class={`drop ${isOver ? "over" : ""}`}
      onDragOver={(event) => {
        event.preventDefault();
        setOver(true);
      }}
      onDragLeave={() => setOver(false)}
      onDrop={(event) => {
        event.preventDefault();
        setOver(false);
        if (event.dataTransfer) dropped(event.dataTransfer.items).then(onFiles, reportError);
      }}
    >
      <span>Drop the folder that PEFT has saved, or its two files.</span>
      <Button onClick={() => input.current?.click()}>Choose files</Button>
      <input
        ref={input}
        type="file"
        multiple
        hidden
        aria-label="Files"
        onChange={(event) => {
          onFiles([...(event.currentTarget.files ?? [])]);
          event.currentTarget.value = "";
        }}
      />
    </div>
  );
}

function FileRow({ name, file }: { name: string; file: File | undefined }) {
  return (
    <span class="row">
      <Chip kind={file ? "ok" : ""}>{file ? "chosen" : "missing"}</Chip>
      <code>{name}</code>
      {file && <span class="dim3 num">{bytes(file.size)}</span>}
    </span>
  );
}

function Checked({ version }: { version: DryRun }) {
  return (
    <div class="stack">
      <p class="note ok">
        {method(version.peft_type)}, {version.kind === "adapter" ? `rank ${version.rank}` : `${version.num_virtual_tokens} virtual tokens`}, {bytes(version.size)}, {plural(version.blocks, "block")} on the device. The server takes these files.
        {version.existing_version !== null && ` Version ${version.existing_version} of ${version.id} has the same bytes: uploading changes only its description, tags and metadata.`}
      </p>
      {version.warnings.map((warning) => (
        <p key={warning} class="note warn">
          {warning}
        </p>
      ))}
    </div>
  );
}

function Faults({ faults }: { faults: Fault[] }) {
  return (
    <ul class="faults" aria-label="Faults">
      {faults.map((fault, index) => (
        <li key={index}>
          {fault.code && <Chip kind="bad">{fault.code}</Chip>}
          <span>{fault.message}</span>
          {(fault.file || fault.field) && (
            <code class="dim3">
              {[fault.file, fault.field].filter(Boolean).join(" › ")}
            </code>
          )}
        </li>
      ))}
    </ul>
  );
}
