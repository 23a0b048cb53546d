// A question as a command or a program. What is copied runs as it is: no placeholder but the key's variable.
import { server } from "../app/server";
import { type Question, requestsOf } from "./model";

export type Language = "curl" | "Python" | "JavaScript" | "command line";

export const LANGUAGES: Language[] = ["curl", "Python", "JavaScript", "command line"];

/** A text as one word of a POSIX shell. */
export const shell = (text: string): string => `'${text.replaceAll("'", `'\\''`)}'`;

/** A JSON value as a Python literal. */
export function python(value: unknown, indent = "    "): string {
  if (value === null || value === undefined) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  if (Array.isArray(value)) return `[${value.map((one) => python(one, indent)).join(", ")}]`;
  const inner = Object.entries(value).map(([key, one]) => `${indent}    ${JSON.stringify(key)}: ${python(one, `${indent}    `)},`);
  return `{\n${inner.join("\n")}\n${indent}}`;
}

const READ: Record<string, string> = {
  "/v1/classify": "data",
  "/v1/completions": "choices",
  "/v1/chat/completions": "choices",
};

function curl(question: Question, origin: string, hasKeys: boolean): string {
  const key = hasKeys ? ` \\\n  -H "Authorization: Bearer $PRELUDE_API_KEY"` : "";
  return requestsOf(question)
    .map(({ path, body }) => `curl -s ${shell(origin + path)} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d ${shell(JSON.stringify(body))}`)
    .join("\n\n");
}

function inPython(question: Question, origin: string, hasKeys: boolean): string {
  const headers = hasKeys ? `, "Authorization": "Bearer " + os.environ["PRELUDE_API_KEY"]` : "";
  const calls = requestsOf(question).map(({ path, body }) => `for answer in ask(${JSON.stringify(path)}, ${python(body, "")})[${JSON.stringify(READ[path])}]:\n    print(answer)`);
  return [
    hasKeys ? "import json\nimport os\nimport urllib.request" : "import json\nimport urllib.request",
    `def ask(path, body):
    headers = {"Content-Type": "application/json"${headers}}
    request = urllib.request.Request(${JSON.stringify(origin)} + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        return json.load(response)`,
    ...calls,
  ].join("\n\n\n");
}

function inJavaScript(question: Question, origin: string, hasKeys: boolean): string {
  const key = hasKeys ? ", Authorization: `Bearer ${process.env.PRELUDE_API_KEY}`" : "";
  return requestsOf(question)
    .map(
      ({ path, body }) => `await fetch(${JSON.stringify(origin + path)}, {
  method: "POST",
  headers: { "Content-Type": "application/json"${key} },
  body: JSON.stringify(${JSON.stringify(body, null, 2).replaceAll("\n", "\n  ")}),
})
  .then((response) => response.json())
  .then(({ ${READ[path]} }) => console.log(${READ[path]}));`,
    )
    .join("\n\n");
}

function inShell(question: Question, origin: string): string {
  const { mode, knobs, text, labels, members } = question;
  const flags: string[] = [];
  if (mode === "classify") {
    const given = labels.split("\n").filter(Boolean);
    flags.push(...(given.length > 0 ? ["--labels", shell(given.map((label) => label.replaceAll(",", "\\,")).join(","))] : ["--classify"]));
  } else {
    flags.push("--generate");
    for (const [name, flag] of [["max_tokens", "--max-tokens"], ["temperature", "--temperature"], ["top_p", "--top-p"], ["seed", "--seed"]] as const)
      if (knobs[name]) flags.push(flag, knobs[name]);
    if (knobs.stop) flags.push("--stop", shell(knobs.stop.replaceAll("\\n", "\n")));
  }
  const rows = `printf '%s\\n' ${shell(JSON.stringify(mode === "chat" ? { messages: [{ role: "user", content: text }] } : { prompt: text }))} > rows.jsonl`;
  const runs = members
    .filter((member) => member !== server.value?.model.id)
    .map((member, index) => `prelude run ${shell(member)} rows.jsonl answers-${index + 1}.jsonl --url ${shell(origin)} ${flags.join(" ")}\ncat answers-${index + 1}.jsonl`);
  return [rows, ...runs].join("\n");
}

/** The question in a language. */
export function snippet(language: Language, question: Question): string {
  const { origin } = location;
  const hasKeys = server.value?.has_keys ?? false;
  if (language === "curl") return `${curl(question, origin, hasKeys)}\n`;
  if (language === "Python") return `${inPython(question, origin, hasKeys)}\n`;
  if (language === "JavaScript") return `${inJavaScript(question, origin, hasKeys)}\n`;
  return `${inShell(question, origin)}\n`;
}

/** Why a question cannot be written in a language; undefined if it can. */
export function unsupported(language: Language, { mode, members }: Question): string | undefined {
  if (language !== "command line") return undefined;
  if (mode === "score") return "The command line does not score texts.";
  return members.some((member) => member !== server.value?.model.id) ? undefined : "The command line needs a soft prompt.";
}
