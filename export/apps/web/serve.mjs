// npm start [-- PORT]: serves this folder on 127.0.0.1. Any static server will do that sends the same headers.
import { createReadStream, statSync } from "node:fs";
import { createServer } from "node:http";
import { extname, join } from "node:path";
import { fileURLToPath } from "node:url";

const root = fileURLToPath(new URL(".", import.meta.url));
const types = { ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript",
                ".json": "application/json", ".wasm": "application/wasm", ".wav": "audio/wav" }; // prettier-ignore
const headers = {
  // These two let WebAssembly use several threads.
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  // And this lets the page speak to nobody but this server.
  "Content-Security-Policy":
    "default-src 'self'; img-src 'self' data:; script-src 'self' 'wasm-unsafe-eval' blob:; worker-src 'self' blob:; connect-src 'self' blob: data:",
  "Cache-Control": "no-cache",
};

const server = createServer((request, response) => {
  const path = fileOf(request.url);
  const found = path?.startsWith(root) && statSync(path, { throwIfNoEntry: false });
  if (!found || !found.isFile()) {
    response.writeHead(404, headers).end("not found");
    return;
  }
  const type = types[extname(path)] ?? "application/octet-stream";
  response.writeHead(200, { ...headers, "Content-Type": type, "Content-Length": found.size });
  if (request.method === "HEAD") response.end();
  else createReadStream(path).pipe(response);
});

function fileOf(address) {
  try {
    const { pathname } = new URL(address, "http://localhost");
    return join(root, decodeURIComponent(pathname === "/" ? "/index.html" : pathname));
  } catch {
    return undefined; // no address that any file has
  }
}

server.listen(Number(process.argv[2] ?? 8000), "127.0.0.1", () => {
  console.log(`http://127.0.0.1:${server.address().port}`);
});
