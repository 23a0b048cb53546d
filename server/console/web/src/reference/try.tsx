// Sending a request from the reference, with the session of the page.
import { useState } from "preact/hooks";
import { ApiError, HEADERS, query } from "../api/client";
import { duration } from "../ui/format";
import { Button, Card, Chip, Field } from "../ui/parts";
import { type Endpoint, exampleOf } from "./document";

const MAX_SHOWN = 200_000;

interface Answer {
  status: number;
  seconds: number;
  text: string;
}

export function TryIt({ endpoint }: { endpoint: Endpoint }) {
  const { operation, method } = endpoint;
  const parameters = operation.parameters ?? [];
  const example = exampleOf(endpoint);
  const isUpload = operation.requestBody !== undefined && example === undefined;
  const [values, setValues] = useState<Record<string, string>>({});
  const [body, setBody] = useState(example ?? "");
  const [answer, setAnswer] = useState<Answer>();
  const [fault, setFault] = useState<string>();
  const missing = parameters.find((one) => one.required && !values[one.name]);

  async function send(event: Event) {
    event.preventDefault();
    if (missing || isUpload) return;
    const path = endpoint.path.replace(/\{(\w+)\}/g, (_, name: string) => encodeURIComponent(values[name] ?? ""));
    const asked = Object.fromEntries(parameters.filter((one) => one.in === "query").map((one) => [one.name, values[one.name]]));
    const began = performance.now();
    setFault(undefined);
    try {
      const response = await fetch(path + query(asked), {
        method,
        headers: example === undefined ? HEADERS : { ...HEADERS, "Content-Type": "application/json" },
        body: example === undefined ? null : body,
      });
      setAnswer({ status: response.status, seconds: (performance.now() - began) / 1000, text: pretty(await response.text()) });
    } catch (error) {
      if (!(error instanceof TypeError || error instanceof ApiError)) throw error;
      setFault("The server does not answer.");
    }
  }

  return (
    <Card title="Try it" side={<span class="dim3">with this session’s key, on this server</span>}>
      <form class="pad stack" onSubmit={send}>
        {parameters.map((one) => (
          <Field key={one.name} label={`${one.name}${one.required ? "" : " (optional)"}`} value={values[one.name] ?? ""} onInput={(value) => setValues({ ...values, [one.name]: value })} />
        ))}
        {example !== undefined && <Field label="Body" rows={Math.min(12, body.split("\n").length + 1)} value={body} onInput={setBody} class="mono" />}
        <span class="row">
          <Button kind={method === "DELETE" ? "danger" : "primary"} submit blocked={isUpload ? "Files are uploaded on the page Upload." : missing && `${missing.name} is missing.`}>
            Send
          </Button>
          {fault && <span class="bad">{fault}</span>}
        </span>
        <div role="status">
          {answer && (
            <div class="stack">
              <span class="row">
                <Chip kind={answer.status < 400 ? "ok" : "bad"}>{answer.status}</Chip>
                <span class="dim3 num">{duration(answer.seconds)}</span>
              </span>
              <pre class="output" tabIndex={0} role="region" aria-label="Answer">
                {answer.text.slice(0, MAX_SHOWN)}
              </pre>
            </div>
          )}
        </div>
      </form>
    </Card>
  );
}

function pretty(text: string): string {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
