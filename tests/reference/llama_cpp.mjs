// What llama.cpp itself says about a GGUF: its own tokenizer's ids, its greedy continuations, its argmax.
//
//     cd FOLDER_WITH_NODE_MODULES && node PATH/TO/llama_cpp.mjs MODEL.gguf < request.json > answer.json
//
// request: {"texts": ["…"], "continue": {"prompts": [[ids]], "new_tokens": 32}, "judge": [[ids]]}, each key optional
// answer:  {"llama_cpp", "node_llama_cpp", "ids": [[ids]], "continuations": [[new ids]], "argmax": [[ids]]}, as asked

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// A plain import looks for node_modules beside this file; it is installed where the command runs.
const installed = createRequire(`${process.cwd()}/`).resolve("node-llama-cpp");
const { getLlama, getModuleVersion } = await import(pathToFileURL(installed));

const request = JSON.parse(readFileSync(0, "utf8"));
const prompts = request.continue?.prompts ?? [];
const newTokens = request.continue?.new_tokens ?? 32;
const judged = request.judge ?? [];

const llama = await getLlama({
    gpu: false, // the CPU even where a GPU is found: the kernels pick the last digits
    build: "never", // the prebuilt binary or an error: no compiler, no download
    maxThreads: 2,
    logger: (level, message) => console.error(message), // stdout is for the answer alone
});
const model = await llama.loadModel({ modelPath: process.argv[2] });
const answer = { llama_cpp: llama.llamaCppRelease.release, node_llama_cpp: await getModuleVersion() };

// `true`: "<|im_start|>" in a text is the special token, as in transformers. No BOS is added.
if (request.texts) answer.ids = request.texts.map((text) => model.tokenize(text, true));

if (prompts.length || judged.length) {
    // Room for the longest and a spare cell: a full context drops its oldest tokens without a word.
    const lengths = [...prompts.map((ids) => ids.length + newTokens), ...judged.map((ids) => ids.length)];
    const context = await model.createContext({ contextSize: Math.max(...lengths) + 1, threads: 2 });
    const sequence = context.getSequence();

    if (request.continue) answer.continuations = [];
    for (const ids of prompts) {
        await sequence.clearHistory(); // or it would continue the one before
        const continuation = [];
        // Temperature 0 is the argmax, with no penalty; an end token is yielded like any other and does not stop it.
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
