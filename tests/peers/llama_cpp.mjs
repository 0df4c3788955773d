// llama.cpp as a participant of `make bench-peers`; it speaks as worker.py does.
//
//     node llama_cpp.mjs FOLDER_WITH_NODE_MODULES MODEL.gguf TASK.json

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const installed = createRequire(`${process.argv[2]}/`).resolve("node-llama-cpp");
const { getLlama } = await import(pathToFileURL(installed));
const { ids: [prompt], new_tokens: count, threads } = JSON.parse(readFileSync(process.argv[4], "utf8"));
const say = (content) => process.stdout.write(JSON.stringify(content) + "\n");

const logger = (level, message) => console.error(message); // only answers go to stdout
const llama = await getLlama({ gpu: false, build: "never", maxThreads: threads, logger });
const model = await llama.loadModel({ modelPath: process.argv[3] });
// one more than the text: a full context drops its oldest tokens
const context = await model.createContext({ contextSize: prompt.length + count + 1, threads });
const sequence = context.getSequence();

async function generate() {
    await sequence.clearHistory();
    const tokens = [];
    for await (const id of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
        if (tokens.push(id) >= count) return tokens;
    }
}

say([await generate(), await generate()]);
for await (const _ of createInterface({ input: process.stdin })) {
    const start = performance.now();
    await generate();
    say((performance.now() - start) / 1000);
}
process.exit();
