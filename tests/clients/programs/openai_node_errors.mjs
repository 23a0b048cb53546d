// The error classes that callers catch. Arguments: base URL, the base model's name.
import OpenAI from "openai";

const [baseURL, base] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });

async function fault(body) {
  try {
    await client.completions.create({ prompt: "x", ...body });
  } catch (error) {
    const { status, code, param } = error;
    return { name: error.constructor.name, status, code, param };
  }
}

console.log(JSON.stringify({
  model: await fault({ model: "nothing" }),
  prompt: await fault({ model: base, prompt_id: "nothing" }),
  field: await fault({ model: base, top_p: 2 }),
}));
