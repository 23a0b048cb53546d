// The API reference, from the server's own document; nothing is read from elsewhere.
import { Fragment } from "preact";
import { call } from "../api/client";
import { href, route, setParams } from "../app/router";
import { useLoad } from "../ui/load";
import { Card, Chip, Empty, ErrorNote, Loading, Scroll } from "../ui/parts";
import { byTag, type Document, type Endpoint, resolved, type Schema, typeOf } from "./document";
import { TryIt } from "./try";

const METHODS: Record<string, string> = { GET: "ok", POST: "alias", PUT: "warn", PATCH: "warn", DELETE: "bad" };

export function ReferencePage() {
  const { data, error, reload } = useLoad("openapi", (signal) => call<Document>("GET", "/openapi.json", undefined, signal));
  const words = (route.value.params.get("q") ?? "").toLowerCase();
  const at = route.value.params.get("at");
  return (
    <>
      <div class="title">
        <h1>API</h1>
        {data && <Chip>{data.info.version}</Chip>}
        <span class="grow" />
        <a class="btn" href="/openapi.json" download="openapi.json">
          OpenAPI document
        </a>
      </div>
      {error && <ErrorNote error={error} retry={reload} />}
      {!data && !error && <Loading />}
      {data && <Browser document={data} words={words} at={at} />}
    </>
  );
}

function Browser({ document, words, at }: { document: Document; words: string; at: string | null }) {
  const tags = byTag(document);
  const all = [...tags.values()].flat();
  const shown = all.find((endpoint) => endpoint.id === at) ?? all[0];
  const fits = (endpoint: Endpoint) => `${endpoint.id} ${endpoint.operation.summary}`.toLowerCase().includes(words);
  return (
    <div class="cols reference">
      <nav class="card" aria-label="Routes">
        <div class="pad">
          <input type="search" aria-label="Search routes" placeholder="Search routes" value={words} onInput={(event) => setParams({ q: event.currentTarget.value })} />
        </div>
        {[...tags].map(([tag, endpoints]) => {
          const found = endpoints.filter(fits);
          return (
            found.length > 0 && (
              <Fragment key={tag}>
                <h2 class="tag">{tag}</h2>
                <ul>
                  {found.map((endpoint) => (
                    <li key={endpoint.id}>
                      <a
                        href={href(["api"], { at: endpoint.id })}
                        aria-current={endpoint === shown ? "true" : undefined}
                        onClick={(event) => {
                          event.preventDefault();
                          setParams({ at: endpoint.id });
                        }}
                      >
                        <Chip kind={METHODS[endpoint.method] ?? ""}>{endpoint.method}</Chip>
                        <span class="mono any">{endpoint.path}</span>
                      </a>
                    </li>
                  ))}
                </ul>
              </Fragment>
            )
          );
        })}
        {!all.some(fits) && <Empty title="No route fits." />}
      </nav>
      {shown && <EndpointView key={shown.id} document={document} endpoint={shown} />}
    </div>
  );
}

/** A text of the document: `code` between backquotes, all else as it is. */
function Prose({ text }: { text: string }) {
  return (
    <>
      {text.split("\n\n").map((part, index) => (
        <p key={index}>{part.split("`").map((piece, at) => (at % 2 === 1 ? <code key={at}>{piece}</code> : piece))}</p>
      ))}
    </>
  );
}

function EndpointView({ document, endpoint }: { document: Document; endpoint: Endpoint }) {
  const { operation, method, path } = endpoint;
  const [type, body] = Object.entries(operation.requestBody?.content ?? {})[0] ?? [];
  const [status, answer] = Object.entries(operation.responses)[0] ?? [];
  const reply = Object.values(answer?.content ?? {})[0]?.schema;
  return (
    <div class="stack">
      <Card title={operation.summary} side={<Chip kind={METHODS[method] ?? ""}>{method}</Chip>}>
        <div class="pad stack">
          <code class="strong">{path}</code>
          {operation.description && <div><Prose text={operation.description} /></div>}
        </div>
        {operation.parameters && operation.parameters.length > 0 && (
          <Fields title="Parameters" rows={operation.parameters.map((one) => [one.name, one.schema, one.description ?? one.schema.description ?? "", Boolean(one.required)])} document={document} />
        )}
        {body?.schema && <SchemaFields title={`Body, ${type}`} schema={body.schema} document={document} />}
      </Card>
      <TryIt endpoint={endpoint} />
      <Card title={`Answer ${status}`}>
        {reply && <SchemaFields title={typeOf(document, reply)} schema={reply} document={document} />}
        <ul class="lines">
          {Object.entries(operation.responses).map(([code, response]) => (
            <li key={code}>
              <span class="row">
                <Chip kind={code < "400" ? "ok" : "bad"}>{code}</Chip>
                <span class="any">{response.description}</span>
              </span>
            </li>
          ))}
        </ul>
      </Card>
    </div>
  );
}

function SchemaFields({ title, schema, document }: { title: string; schema: Schema; document: Document }) {
  const { properties, required } = resolved(document, schema);
  if (!properties) return null;
  return <Fields title={title} document={document} rows={Object.entries(properties).map(([name, one]) => [name, one, one.description ?? "", Boolean(required?.includes(name))])} />;
}

function Fields({ title, rows, document }: { title: string; rows: [string, Schema, string, boolean][]; document: Document }) {
  return (
    <Scroll label={title}>
      <table class="diff">
        <caption class="pad">
          <h3>{title}</h3>
        </caption>
        <thead>
          <tr>
            <th scope="col">Name</th>
            <th scope="col">Type</th>
            <th scope="col">Meaning</th>
          </tr>
        </thead>
        <tbody>
          {rows.map(([name, schema, description, isRequired]) => (
            <tr key={name}>
              <th scope="row">
                <code>{name}</code>
                {isRequired && <span class="bad"> required</span>}
              </th>
              <td>
                <code>{typeOf(document, schema)}</code>
              </td>
              <td>{description.split("`").map((piece, at) => (at % 2 === 1 ? <code key={at}>{piece}</code> : piece))}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </Scroll>
  );
}
