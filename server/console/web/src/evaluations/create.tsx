// A new evaluation: a model, and a file of labelled rows, which the server answers.
import { useState } from "preact/hooks";
import { ApiError, call } from "../api/client";
import type { Evaluation } from "../api/types";
import { bytes } from "../ui/format";
import { useLoad } from "../ui/load";
import { Dialog } from "../ui/dialog";
import { Button, ErrorNote, Field } from "../ui/parts";

const MAX_BYTES = 8 * 1024 * 1024;

interface Models {
  data: { id: string }[];
}

export function CreateDialog({ model: initial, onClose, onCreated }: { model: string; onClose: () => void; onCreated: (id: string) => void }) {
  const [model, setModel] = useState(initial);
  const [file, setFile] = useState<File>();
  const [name, setName] = useState("");
  const [textPrompt, setTextPrompt] = useState("");
  const [keeps, setKeeps] = useState(false);
  const [error, setError] = useState<ApiError>();
  const [isRunning, setRunning] = useState(false);
  const models = useLoad("models", (signal) => call<Models>("GET", "/v1/models", undefined, signal));
  const blocked = isRunning
    ? "The file is being sent."
    : !model
      ? "Name a model."
      : !file
        ? "Choose a file."
        : file.size > MAX_BYTES
          ? `The file has ${bytes(file.size)}, of at most 8 MiB.`
          : undefined;

  async function create() {
    setRunning(true);
    setError(undefined);
    try {
      const body = { model, name, dataset: file!.name, data: await file!.text(), keep_texts: keeps, text_prompt: textPrompt || null };
      onCreated((await call<Evaluation>("POST", "/v1/evaluations", body)).id);
    } catch (failure) {
      if (!(failure instanceof ApiError)) throw failure;
      setError(failure);
      setRunning(false);
    }
  }

  return (
    <Dialog title="New evaluation" onClose={onClose}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          if (!blocked) void create();
        }}
      >
        <div class="pad stack">
          <Field label="Model" value={model} onInput={setModel} list="evaluated-models" autoFocus hint="A soft prompt, a version (NAME@2), an alias, or the base model." />
          <datalist id="evaluated-models">{models.data?.data.map(({ id }) => <option key={id} value={id} />)}</datalist>
          <label class="field">
            <span class="label">Labelled rows, in JSON Lines</span>
            <input type="file" accept=".jsonl,.ndjson,.json,application/jsonl" onChange={(event) => setFile(event.currentTarget.files?.[0])} />
            <small>{`{"text", "label"}, {"prompt", "completion"} or {"messages"}; at most 5,000 rows and 8 MiB.`}</small>
          </label>
          <Field label="Name (optional)" value={name} onInput={setName} />
          <Field label="Text prompt (optional)" value={textPrompt} onInput={setTextPrompt} rows={2} hint="An instruction before each text, or around {}: to compare a soft prompt with a written one." />
          <label class="check">
            <input type="checkbox" checked={keeps} onChange={(event) => setKeeps(event.currentTarget.checked)} /> Keep the texts of the rows
          </label>
          {error && <Faults error={error} />}
        </div>
        <footer>
          <Button onClick={onClose}>Cancel</Button>
          <Button kind="primary" submit needs="generate" blocked={blocked}>
            Start
          </Button>
        </footer>
      </form>
    </Dialog>
  );
}

function Faults({ error }: { error: ApiError }) {
  const listed = Array.isArray(error.details) ? (error.details as { line: number; message: string }[]) : [];
  if (listed.length < 2) return <ErrorNote error={error} />;
  return (
    <ul class="faults" role="alert">
      {listed.map((fault) => (
        <li key={fault.line} class="bad">
          Line {fault.line}: {fault.message}
        </li>
      ))}
    </ul>
  );
}
