// Conversations of the Vercel AI SDK with a server: node conversations.mjs BASE_URL MODEL THOUGHTFUL_MODEL EMBEDDER
// Prints one JSON object: what each of them came to. Whether that is right is for the test to say.

import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { Output, embedMany, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from 'ai';
import { z } from 'zod';

const [baseURL, name, thoughtfulName, embedder] = process.argv.slice(2);
const octavo = createOpenAICompatible({
  name: 'octavo', baseURL, apiKey: 'none', includeUsage: true, supportsStructuredOutputs: true,
});
const model = octavo(name);
const report = z.object({ city: z.string(), celsius: z.number().int(), sky: z.enum(['sunny', 'rainy']) });
const celsius = { Paris: 21, Rome: 27, Oslo: -3 };
const asked = [];
const tools = {
  get_weather: tool({
    description: 'The weather of a city',
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => {
      asked.push(city);
      return `${celsius[city]} °C in ${city}`;
    },
  }),
};
const stopWhen = stepCountIs(4);

const conversations = {
  async text() {
    const { text, finishReason, usage } = await generateText({ model, prompt: 'Hello!', maxOutputTokens: 200 });
    return { text, finishReason, usage };
  },

  async tools() {
    const result = await generateText({ model, tools, stopWhen, prompt: 'How is the weather in Paris and Rome?' });
    const steps = result.steps.map(({ finishReason, toolCalls }) => ({
      finishReason, calls: toolCalls.map(({ toolName, input }) => [toolName, input]),
    }));
    return { text: result.text, steps };
  },

  async streamedTools() {
    const result = streamText({ model, tools, stopWhen, prompt: 'How is the weather in Oslo?', onError() {} });
    const parts = [];
    let text = '';
    for await (const part of result.fullStream) {
      if (part.type === 'error') throw part.error;
      if (part.type === 'text-delta') text += part.text;
      if (parts.at(-1) !== part.type) parts.push(part.type);
    }
    return { text, parts, finishReason: await result.finishReason, usage: await result.totalUsage };
  },

  async failingTool() {
    const broken = { get_weather: { ...tools.get_weather, execute: async () => { throw new Error('no network'); } } };
    const { text } = await generateText({ model, tools: broken, stopWhen, prompt: 'How is the weather in Oslo?' });
    return { text };
  },

  async object() {
    const { object } = await generateObject({ model, schema: report, prompt: 'It is 17 °C in Rome.' });
    return { object };
  },

  async streamedObject() {
    const result = streamObject({ model, schema: report, prompt: 'It is 17 °C in Rome.', onError() {} });
    const seen = [];
    for await (const partial of result.partialObjectStream) seen.push(partial);
    return { object: await result.object, partials: seen.length };
  },

  async toolsThenObject() {
    const result = await generateText({
      model, tools, stopWhen, output: Output.object({ schema: report }), prompt: 'How is the weather in Rome?',
    });
    return { object: result.output, steps: result.steps.length };
  },

  async required() {
    const { toolCalls } = await generateText({ model, tools, toolChoice: 'required', prompt: 'How is Rome?' });
    return { calls: toolCalls.map(({ toolName, input }) => [toolName, input]) };
  },

  async thoughts() {
    const thinker = octavo(thoughtfulName);
    const prompt = 'How is the weather in Rome?';
    const { text, reasoningText, steps } = await generateText({ model: thinker, tools, stopWhen, prompt });
    const result = streamText({ model: thinker, prompt: 'Hello!', onError() {} });
    const { object } = await generateObject({ model: thinker, schema: report, prompt: 'It is 17 °C in Rome.' });
    return { text, reasoningText, steps: steps.length, streamed: [await result.text, await result.reasoningText], object };
  },

  async embeddings() {
    const { embeddings, usage } = await embedMany({
      model: octavo.textEmbeddingModel(embedder), values: ['one', 'two', 'one'],
    });
    return { embeddings, usage };
  },

  async refusal() {
    try {
      await generateText({ model, prompt: 'Hello!', temperature: -1, maxRetries: 0 });
    } catch (error) {
      return { name: error.name, status: error.statusCode, message: error.message };
    }
  },

  async aborted() {
    const controller = new AbortController();
    const result = streamText({
      model, prompt: 'Hello!'.repeat(500), abortSignal: controller.signal, onError() {},
    });
    let seen = 0;
    for await (const part of result.fullStream) {
      if (part.type === 'text-delta' && ++seen === 3) controller.abort();
      if (part.type === 'abort') return { seen };
    }
    return { seen, finished: true };
  },
};

const came = {};
for (const [what, talk] of Object.entries(conversations)) {
  try {
    came[what] = await talk();
  } catch (error) {
    came[what] = { error: String(error), body: error.responseBody };
  }
}
came.asked = asked;
console.log(JSON.stringify(came));
