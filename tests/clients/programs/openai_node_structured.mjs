// Structured answers and a forced tool call. Arguments: base URL, the fields that name the soft prompt, a text.
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [baseURL, named, text] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const Verdict = z.object({ label: z.enum(["positive", "negative"]) });
const messages = [{ role: "user", content: text }];
const ask = { ...JSON.parse(named), messages, temperature: 0, max_tokens: 64 };

const format = { response_format: zodResponseFormat(Verdict, "verdict") };
const parsed = await client.chat.completions.parse({ ...ask, ...format });
const streamed = await client.chat.completions.stream({ ...ask, ...format }).finalChatCompletion();
const called = await client.chat.completions.parse({
  ...ask,
  tools: [zodFunction({ name: "Verdict", parameters: Verdict })],
  tool_choice: { type: "function", function: { name: "Verdict" } },
});
const call = called.choices[0].message.tool_calls[0].function;

console.log(JSON.stringify({
  parsed: parsed.choices[0].message.parsed,
  streamed: streamed.choices[0].message.parsed,
  toolName: call.name,
  toolArguments: call.parsed_arguments,
}));
