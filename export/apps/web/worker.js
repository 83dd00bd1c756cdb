// The model works here, so that the page never stops answering its user.
import * as transformers from "./node_modules/@huggingface/transformers/dist/transformers.min.js";
import { Bundle } from "./bundle.js";
import { checkGolden } from "./golden.js";

const runtime = new URL("./node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded", import.meta.url).href;
// The build with WebGPU, transformers.js's default, lacks GatherBlockQuantized on the processor; the plain one is half its size.
const BUILDS = { wasm: runtime, webgpu: `${runtime}.asyncify` };
const { env } = transformers;
env.allowRemoteModels = false; // nothing but the bundle beside this file
env.allowLocalModels = true;
env.localModelPath = "./"; // relative: transformers.js takes what is an address for a hub
env.useBrowserCache = false; // it would keep an old bundle under the same name
env.useWasmCache = false;

let bundle;

const commands = {
  async open({ device }) {
    env.backends.onnx.wasm.wasmPaths = { mjs: `${BUILDS[device]}.mjs`, wasm: `${BUILDS[device]}.wasm` };
    const manifest = await (await fetch("./bundle/qft.json")).json();
    const progress_callback = (event) => event.status === "progress" && say("progress", event);
    bundle = await Bundle.open(transformers, "bundle", manifest, { device, progress_callback });
    return { manifest };
  },
  answer: ({ input }) => bundle.answer(input, { onText: (text) => say("text", { text }) }),
  check: () => checkGolden(bundle, { readSound, onProgress: (done, total) => say("checked", { done, total }) }),
};

const say = (event, facts) => postMessage({ event, ...facts });

async function readSound(name) {
  const file = await (await fetch(`./bundle/${name}`)).arrayBuffer();
  const { readWav } = await import("./wav.js");
  return readWav(new Uint8Array(file));
}

addEventListener("message", async ({ data: { command, ...given } }) => {
  try {
    say("done", { command, result: await commands[command](given) });
  } catch (error) {
    say("failed", { command, message: String(error?.message ?? error) });
  }
});
