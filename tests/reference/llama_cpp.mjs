// Runs llama.cpp on a GGUF file, for the tests and for `make bench-peers`.
//
//     node llama_cpp.mjs FOLDER_WITH_NODE_MODULES MODEL.gguf TASK.json
//
// TASK.json: {"threads": 2, "texts": ["…"], "ids": [[prompt]], "new_tokens": 32, "judge": [[ids]]}
// (without texts, ids or judge: none). The first line printed is the list of results: for each text
// its token ids, for each prompt its greedy continuation, for each text to judge the argmax at each
// position. Then, for each line of stdin, the seconds of continuing the first prompt once more.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const [folder, modelPath, file] = process.argv.slice(2);
const { threads, texts = [], ids: prompts = [], new_tokens: count = 0, judge: judged = [] } =
    JSON.parse(readFileSync(file, "utf8"));
const say = (content) => process.stdout.write(JSON.stringify(content) + "\n");

// A plain import would search in this file's folder.
const installed = createRequire(`${folder}/`).resolve("node-llama-cpp");
const { getLlama } = await import(pathToFileURL(installed));
const llama = await getLlama({
    gpu: false, // always the CPU, because GPU kernels round differently
    build: "never", // only the prebuilt binary: no compiler, no download
    maxThreads: threads,
    logger: (level, message) => console.error(message), // only answers go to stdout
});
const model = await llama.loadModel({ modelPath });
const lengths = [...prompts.map((ids) => ids.length + count), ...judged.map((ids) => ids.length)];
// One more than the longest text: a full context silently drops its oldest tokens.
const context = await model.createContext({ contextSize: Math.max(0, ...lengths) + 1, threads });
const sequence = context.getSequence();

async function generate(prompt) {
    await sequence.clearHistory(); // otherwise it continues the previous prompt
    const tokens = [];
    // Temperature 0 gives the argmax, without penalties. An end token does not stop the generation.
    for await (const id of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
        if (tokens.push(id) >= count) return tokens;
    }
}

async function argmax(ids) {
    await sequence.clearHistory();
    const next = { generateNext: { token: true, options: { temperature: 0 } } };
    const after = await sequence.controlledEvaluate(ids.map((id) => [id, next]));
    return after.map(({ next }) => next.token);
}

// `true`: "<|im_start|>" in a text becomes the special token, as in transformers. No BOS is added.
const results = texts.map((text) => model.tokenize(text, true));
for (const prompt of prompts) results.push(await generate(prompt));
for (const ids of judged) results.push(await argmax(ids));
say(results);

for await (const _ of createInterface({ input: process.stdin })) {
    const start = performance.now();
    await generate(prompts[0]);
    say((performance.now() - start) / 1000);
}
await llama.dispose();
