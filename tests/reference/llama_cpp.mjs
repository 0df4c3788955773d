// Runs llama.cpp on a GGUF file: token ids of its tokenizer, greedy continuations, and argmax.
//
//     cd FOLDER_WITH_NODE_MODULES && node PATH/TO/llama_cpp.mjs MODEL.gguf < request.json > answer.json
//
// request: {"texts": ["…"], "continue": {"prompts": [[ids]], "new_tokens": 32}, "judge": [[ids]]} (each key is optional)
// answer:  {"llama_cpp", "node_llama_cpp", "ids": [[ids]], "continuations": [[new ids]], "argmax": [[ids]]} (for the keys of the request)

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// The package is installed in the current folder; a plain import would search in this file's folder.
const installed = createRequire(`${process.cwd()}/`).resolve("node-llama-cpp");
const { getLlama, getModuleVersion } = await import(pathToFileURL(installed));

const request = JSON.parse(readFileSync(0, "utf8"));
const prompts = request.continue?.prompts ?? [];
const newTokens = request.continue?.new_tokens ?? 32;
const judged = request.judge ?? [];

const llama = await getLlama({
    gpu: false, // always the CPU, because GPU kernels round differently
    build: "never", // only the prebuilt binary: no compiler, no download
    maxThreads: 2,
    logger: (level, message) => console.error(message), // only the answer goes to stdout
});
const model = await llama.loadModel({ modelPath: process.argv[2] });
const answer = { llama_cpp: llama.llamaCppRelease.release, node_llama_cpp: await getModuleVersion() };

// `true`: "<|im_start|>" in a text becomes the special token, as in transformers. No BOS is added.
if (request.texts) answer.ids = request.texts.map((text) => model.tokenize(text, true));

if (prompts.length || judged.length) {
    // One more than the longest text: a full context silently drops its oldest tokens.
    const lengths = [...prompts.map((ids) => ids.length + newTokens), ...judged.map((ids) => ids.length)];
    const context = await model.createContext({ contextSize: Math.max(...lengths) + 1, threads: 2 });
    const sequence = context.getSequence();

    if (request.continue) answer.continuations = [];
    for (const ids of prompts) {
        await sequence.clearHistory(); // otherwise it continues the previous prompt
        const continuation = [];
        // Temperature 0 gives the argmax, without penalties. An end token does not stop the generation.
        for await (const id of sequence.evaluate(ids, { temperature: 0, yieldEogToken: true })) {
            if (continuation.push(id) >= newTokens) break;
        }
        answer.continuations.push(continuation);
    }

    if (request.judge) answer.argmax = [];
    for (const ids of judged) {
        await sequence.clearHistory();
        const argmax = { generateNext: { token: true, options: { temperature: 0 } } };
        const after = await sequence.controlledEvaluate(ids.map((id) => [id, argmax]));
        answer.argmax.push(after.map(({ next }) => next.token));
    }
}

await llama.dispose();
process.stdout.write(JSON.stringify(answer) + "\n");
