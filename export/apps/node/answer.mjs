// node answer.mjs "A waste of two hours."       one answer a text; sound files for speech; question and context for questions;
//                                               a text and those among which its like is searched
// node answer.mjs --check                       is what this machine computes what was measured?
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import * as transformers from "@huggingface/transformers";
import { Bundle } from "./bundle.js";
import { checkGolden } from "./golden.js";
import { readWav } from "./wav.js";

const here = fileURLToPath(new URL(".", import.meta.url));
transformers.env.allowRemoteModels = false; // nothing but the bundle beside this file
transformers.env.localModelPath = here;

const manifest = JSON.parse(readFileSync(`${here}/bundle/qft.json`, "utf8"));
const bundle = await Bundle.open(transformers, "bundle", manifest);
const given = process.argv.slice(2);

if (given[0] === "--check") {
  const found = await checkGolden(bundle, { readSound: (name) => readWav(readFileSync(`${here}/bundle/${name}`)) });
  console.log(JSON.stringify(found));
  process.exitCode = found.agrees ? 0 : 1;
} else {
  for (const input of inputs(given)) {
    const { text, probability, accepted } = await bundle.answer(input);
    const sure = probability === undefined ? "" : `  ${Math.round(100 * probability)}%${accepted === false ? "  unsure" : ""}`;
    console.log((text || "(none)") + sure);
  }
}

function inputs(words) {
  if (manifest.task === "question-answering") return [{ question: words[0], context: words[1] }];
  if (manifest.task === "sentence-similarity") return [{ text: words[0], among: words.slice(1) }];
  if (manifest.task === "automatic-speech-recognition") return words.map((path) => readWav(readFileSync(path)));
  return words;
}
