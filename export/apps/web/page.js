// What the user sees. The model is in worker.js.
const SAMPLE_RATE = 16_000;
const FIELDS = {
  "question-answering": [["question", "Question"], ["context", "Text to find the answer in"]],
  "sentence-similarity": [["text", "Your text"], ["among", "Texts to search, one a line"]],
  "automatic-speech-recognition": [["sound", "Sound file"]],
}; // prettier-ignore
const PURPOSE = {
  "text-generation": "writes an answer",
  "text-classification": "chooses a label",
  "question-answering": "finds the answer in a text",
  "sentence-similarity": "finds texts that are alike",
  "translation": "translates",
  "automatic-speech-recognition": "writes down speech",
};

const at = (id) => document.getElementById(id);
const device = new URL(location).searchParams.get("device") === "webgpu" ? "webgpu" : "wasm";
const worker = new Worker("worker.js", { type: "module" });
let task;

const EVENTS = {
  progress: ({ file, loaded, total }) => state(`opening ${file.split("/").at(-1)}, ${megabytes(loaded)} of ${megabytes(total)}`),
  text: ({ text }) => at("answer").append(text),
  checked: ({ done, total }) => at("checked").replaceChildren(`${done} of ${total} cases …`),
  failed: ({ message }) => {
    if (task) ready();
    state(`It failed: ${message}`);
  },
  done: ({ command, result }) => DONE[command](result),
};
const DONE = {
  open({ manifest }) {
    task = manifest.task;
    document.title = manifest.name;
    at("name").textContent = manifest.name;
    at("about").textContent = `A model that ${PURPOSE[task]}, tuned and checked with qft.`;
    at("fields").replaceChildren(...(FIELDS[task] ?? [["text", "Your text"]]).map(field));
    ready();
  },
  answer({ text, probability, accepted }) {
    const parts = [text || "(none)"];
    if (probability !== undefined) {
      const sure = document.createElement("small");
      sure.textContent = `${Math.round(100 * probability)} %${accepted === false ? ", unsure" : ""}`;
      parts.push(sure);
    }
    at("answer").replaceChildren(...parts);
    ready();
  },
  check({ agrees, agreement, positions, clearDifferences, freeCases, freeDifferences }) {
    const [what, where] = task === "sentence-similarity" ? ["vector", "texts"] : ["first choice", "positions"];
    const found = [`same ${what} at ${(100 * agreement).toFixed(1)} % of ${positions} ${where}`];
    if (clearDifferences) found.push(`${clearDifferences} of the others were clear`);
    else if (agreement < 1) found.push("the others were close");
    if (freeCases) found.push(`${freeCases - freeDifferences} of ${freeCases} answers equal`);
    at("checked").textContent = `${agrees ? "Yes" : "No"}: ${found.join("; ")}.`;
    ready();
  },
};

function field([name, title]) {
  const label = document.createElement("label");
  const input = document.createElement(name === "sound" ? "input" : "textarea");
  Object.assign(input, { name, required: true }, name === "sound" ? { type: "file", accept: "audio/*" } : {});
  label.append(title, input);
  return label;
}

async function input(form) {
  const given = Object.fromEntries(new FormData(form));
  if (task === "question-answering") return { input: given };
  if (task === "sentence-similarity") return { input: { text: given.text, among: given.among.split("\n").filter((line) => line.trim()) } };
  if (task !== "automatic-speech-recognition") return { input: given.text };
  const context = new OfflineAudioContext(1, 1, SAMPLE_RATE);
  return { input: (await context.decodeAudioData(await given.sound.arrayBuffer())).getChannelData(0) };
}

// given: what the command needs, or a promise of it.
async function ask(command, given = {}) {
  at("ask").disabled = at("check").disabled = true;
  try {
    worker.postMessage({ command, ...(await given) });
  } catch (error) {
    EVENTS.failed({ message: String(error?.message ?? error) });
  }
}

function ready() {
  at("ask").disabled = at("check").disabled = false;
  state("");
}

const state = (text) => at("state").replaceChildren(text);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

worker.addEventListener("message", ({ data }) => EVENTS[data.event](data));
worker.addEventListener("error", ({ message }) => state(`It cannot start: ${message || "was npm install done here?"}`));
at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  at("answer").replaceChildren();
  at("answer").hidden = false;
  state("…");
  ask("answer", input(event.target));
});
at("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
at("check").addEventListener("click", () => ask("check"));
for (const name of navigator.gpu ? ["wasm", "webgpu"] : ["wasm"]) {
  at("device").add(new Option(name === "wasm" ? "the processor" : "the graphics card (WebGPU)", name, false, name === device));
}
at("device").addEventListener("change", () => (location.search = `?device=${at("device").value}`));
ask("open", { device });
