// Every way to generate, for one soft prompt. Arguments: base URL, the fields that name the soft prompt, a text.
import OpenAI from "openai";

const [baseURL, named, text] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const ask = { ...JSON.parse(named), temperature: 0, max_tokens: 40 };
const messages = [{ role: "user", content: text }];
const options = { stream: true, stream_options: { include_usage: true } };

const completion = await client.completions.create({ ...ask, prompt: text });

let completionStream = "";
let streamedUsage = null;
for await (const chunk of await client.completions.create({ ...ask, ...options, prompt: text })) {
  completionStream += chunk.choices[0]?.text ?? "";
  streamedUsage = chunk.usage ?? streamedUsage;
}

const chat = await client.chat.completions.create({ ...ask, messages });
let chatChunks = 0;
const stream = client.chat.completions.stream({ ...ask, messages }).on("content", () => (chatChunks += 1));
const chatStream = await stream.finalContent();

const models = [];
for await (const model of client.models.list()) models.push(model.id);

console.log(JSON.stringify({
  completion: completion.choices[0].text,
  completionStream,
  chat: chat.choices[0].message.content,
  chatStream,
  chatChunks,
  usage: completion.usage,
  streamedUsage,
  virtualTokens: completion.usage.prompt_tokens_details.virtual_tokens,
  models,
}));
