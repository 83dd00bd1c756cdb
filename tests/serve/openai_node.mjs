// The openai client for Node against a server whose address is in URL; prints what it got, as JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.URL}/v1`, apiKey: process.env.KEY, maxRetries: 0 });
const messages = [{ role: "user", content: "a fine film at home" }];
const schema = { type: "object", properties: { score: { type: "integer", minimum: 1, maximum: 5 } }, required: ["score"], additionalProperties: false };
const tool = { type: "function", function: { name: "note", parameters: { ...schema } } };
const found = {};

found.models = (await client.models.list()).data.map((model) => model.id);
found.chat = await client.chat.completions.create({ model: "tiny", messages, max_tokens: 16 });
found.streamed = "";
for await (const chunk of await client.chat.completions.create({ model: "tiny", messages, max_tokens: 16, stream: true }))
  found.streamed += chunk.choices[0]?.delta?.content ?? "";
found.completion = (await client.completions.create({ model: "tiny", prompt: "a fine", max_tokens: 4 })).choices[0].text;
const response_format = { type: "json_schema", json_schema: { name: "score", schema, strict: true } };
found.json = JSON.parse((await client.chat.completions.create({ model: "tiny", messages, response_format })).choices[0].message.content);
const called = await client.chat.completions.create({ model: "tiny", messages, tools: [tool], tool_choice: "required" });
found.call = called.choices[0].message.tool_calls[0].function;
found.error = await client.chat.completions.create({ model: "gpt-4", messages }).catch((error) => [error.constructor.name, error.status, error.code]);
const wrong = new OpenAI({ baseURL: `${process.env.URL}/v1`, apiKey: "wrong", maxRetries: 0 });
found.refused = await wrong.models.list().catch((error) => error.constructor.name);
const search = new OpenAI({ baseURL: `${process.env.SEARCH_URL}/v1`, apiKey: "none", maxRetries: 0 });
const input = ["a fine film", "dull and slow"];
found.vectors = (await search.embeddings.create({ model: "tiny", input })).data.map((one) => one.embedding); // asks for base64
found.floats = (await search.embeddings.create({ model: "tiny", input, encoding_format: "float" })).data.map((one) => one.embedding);
console.log(JSON.stringify(found));
