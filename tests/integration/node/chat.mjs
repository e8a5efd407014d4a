// The unmodified `openai` npm package against the edge. Prints one line of JSON with what it saw; test_openai_npm.py judges.
import OpenAI from "openai";

const [url, key, model, echo] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0, timeout: 60_000 });
const system = { role: "system", content: "You are a helpful assistant." };
const script = (directives) => [{ role: "user", content: `${Math.random()} [[echo ${JSON.stringify(directives)}]]` }];
const seen = {};

const chat = await client.chat.completions.create({
  model,
  messages: [system, { role: "user", content: "What is the capital of France?" }],
  temperature: 0,
  max_tokens: 24,
});
seen.chat = chat.choices[0].message.content;
seen.requestId = chat._request_id;

let text = "";
let pieces = 0;
let usage = null;
const stream = await client.chat.completions.create({
  model,
  messages: [system, { role: "user", content: "Name three colors." }],
  temperature: 0,
  max_tokens: 16,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  pieces += chunk.choices.length;
  usage = chunk.usage ?? usage;
}
seen.stream = { text, pieces, usage };

const tool = { type: "function", function: { name: "weather", parameters: { type: "object", properties: { city: { type: "string" } } } } };
const called = await client.chat.completions.create({
  model: echo,
  messages: script({ tool_calls: [{ name: "weather", arguments: { city: "Oslo" } }] }),
  tools: [tool],
});
seen.tool = called.choices[0].message.tool_calls[0].function;

const schema = { type: "object", properties: { name: { type: "string" } }, required: ["name"], additionalProperties: false };
const formatted = await client.chat.completions.create({
  model,
  messages: [system, { role: "user", content: "Describe the city of Paris as JSON." }],
  temperature: 0,
  max_tokens: 60,
  response_format: { type: "json_schema", json_schema: { name: "city", schema, strict: true } },
});
seen.schema = JSON.parse(formatted.choices[0].message.content);

seen.models = [];
for await (const one of client.models.list()) seen.models.push(one.id);
seen.embedding = (await client.embeddings.create({ model: echo, input: "one", dimensions: 32 })).data[0].embedding.length;

seen.errors = {};
const attempt = async (name, work) => {
  try {
    await work();
    seen.errors[name] = null;
  } catch (error) {
    seen.errors[name] = { kind: error.constructor.name, status: error.status, code: error.code };
  }
};
await attempt("model", () => client.chat.completions.create({ model: "no/such", messages: script({}) }));
await attempt("request", () => client.chat.completions.create({ model: echo, messages: [] }));
await attempt("field", () => client.chat.completions.create({ model: echo, messages: script({}), wheels: 4 }));
const stranger = new OpenAI({ baseURL: `${url}/v1`, apiKey: "sk-wrong", maxRetries: 0 });
await attempt("key", () => stranger.models.list());

console.log(JSON.stringify(seen));
