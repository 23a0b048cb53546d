// The server's own OpenAPI document.

export interface Schema {
  $ref?: string;
  type?: string | string[];
  description?: string;
  properties?: Record<string, Schema>;
  required?: string[];
  items?: Schema;
  anyOf?: Schema[];
  oneOf?: Schema[];
  enum?: unknown[];
  const?: unknown;
  default?: unknown;
  example?: unknown;
  examples?: unknown[];
  minimum?: number;
  maximum?: number;
}

export interface Parameter {
  name: string;
  in: "path" | "query" | "header" | "cookie";
  required?: boolean;
  description?: string;
  schema: Schema;
  example?: unknown;
  examples?: unknown;
}

interface Content {
  [type: string]: { schema?: Schema; example?: unknown; examples?: Record<string, { value: unknown }> };
}

export interface Operation {
  summary: string;
  description?: string;
  tags?: string[];
  parameters?: Parameter[];
  requestBody?: { content: Content; required?: boolean };
  responses: Record<string, { description?: string; content?: Content }>;
}

export interface Document {
  info: { title: string; version: string; description?: string };
  paths: Record<string, Record<string, Operation>>;
  components: { schemas: Record<string, Schema> };
}

export interface Endpoint {
  id: string;
  method: string;
  path: string;
  operation: Operation;
}

/** The operations by their first tag, in the document's order. */
export function byTag(document: Document): Map<string, Endpoint[]> {
  const found = new Map<string, Endpoint[]>();
  for (const [path, methods] of Object.entries(document.paths))
    for (const [method, operation] of Object.entries(methods)) {
      const tag = operation.tags?.[0] ?? "other";
      found.set(tag, [...(found.get(tag) ?? []), { id: `${method} ${path}`, method: method.toUpperCase(), path, operation }]);
    }
  return found;
}

/** A schema without its reference. */
export function resolved(document: Document, schema: Schema): Schema {
  const name = schema.$ref?.split("/").at(-1);
  return name === undefined ? schema : (document.components.schemas[name] ?? {});
}

/** A schema's type in words. */
export function typeOf(document: Document, schema: Schema): string {
  if (schema.$ref) return schema.$ref.split("/").at(-1)!;
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  const options = schema.anyOf ?? schema.oneOf;
  if (options) return [...new Set(options.map((option) => typeOf(document, option)))].join(" | ");
  if (schema.type === "array") return `list of ${schema.items ? typeOf(document, schema.items) : "any"}`;
  return [schema.type ?? "any"].flat().join(" | ");
}

/** An example of a JSON body; undefined if the operation takes none. */
export function exampleOf({ operation }: Endpoint): string | undefined {
  const body = operation.requestBody?.content["application/json"];
  if (!body) return undefined;
  const example = body.example ?? Object.values(body.examples ?? {})[0]?.value ?? body.schema?.example ?? body.schema?.examples?.[0] ?? {};
  return JSON.stringify(example, null, 2);
}
