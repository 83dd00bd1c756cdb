// Does this runtime compute what was measured? Golden cases of qft.json: the best logits of each position, or the vector, as the
// bundle was made.
import { cosine } from "./bundle.js";

const CLEAR_MARGIN = 0.5; // a first choice that led by more must be made here too
const LEAST_AGREEMENT = 0.98; // of all positions: 8-bit kernels differ between machines
const LEAST_COSINE = 0.99; // of a vector with the golden one

// readSound: a clip's name → its samples, for a bundle that hears.
export async function checkGolden(bundle, { readSound, onProgress = () => {} } = {}) {
  const found = { positions: 0, same: 0, clearDifferences: 0, freeCases: 0, freeDifferences: 0 };
  const cases = bundle.manifest.golden;
  const count = (same, clear) => {
    found.positions += 1;
    found.same += Number(same);
    found.clearDifferences += Number(!same && clear);
  };
  for (const [number, golden] of cases.entries()) {
    if (golden.embedding) {
      const [{ data }] = await bundle.forward(golden.prompt);
      count(cosine(data, golden.embedding) >= LEAST_COSINE, true);
    } else {
      await compare(bundle, golden, { readSound, found, count });
    }
    onProgress(number + 1, cases.length);
  }
  const agreement = found.same / found.positions;
  const agrees = agreement >= LEAST_AGREEMENT && !found.clearDifferences && !found.freeDifferences;
  return { ...found, agreement, agrees };
}

async function compare(bundle, golden, { readSound, found, count }) {
  const source = golden.clip ? await readSound(golden.clip) : golden.source;
  const chosen = await firstChoices(bundle, golden, source);
  for (const [place, choice] of chosen.entries()) {
    const [best, second] = golden.top_logits[place];
    count(choice === golden.top_ids[place][0], best - second > CLEAR_MARGIN);
  }
  if (golden.free_running) {
    found.freeCases += 1;
    const written = bundle.manifest.feeding.stop_ids.length ? await writtenFreely(bundle, golden, source) : chosen;
    found.freeDifferences += Number(written.join() !== golden.answer.join());
  }
}

const writtenFreely = (bundle, golden, source) =>
  bundle.generate({ source: source ?? golden.prompt, maxNewTokens: golden.answer.length });

// The first choice at each position of the answer: a token, the earlier ones given, or a label or place, read off the prompt.
async function firstChoices(bundle, golden, source) {
  const written = bundle.manifest.feeding.stop_ids.length > 0;
  const ids = written ? [...golden.prompt, ...golden.answer.slice(0, -1)] : golden.prompt;
  const outputs = await bundle.forward(ids, source);
  if (!written) return outputs.map(({ data }) => largest(data));
  const [{ data, width }] = outputs;
  const first = data.length / width - golden.answer.length;
  return golden.answer.map((_, place) => largest(data.subarray((first + place) * width, (first + place + 1) * width)));
}

const largest = (values) => values.reduce((best, value, place) => (value > values[best] ? place : best), 0);
