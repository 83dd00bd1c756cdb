// node axe.mjs PAGE [FOLDER]: opens a report in Chromium from disk, light, dark and printed, at three widths; prints as JSON what axe
// finds, what it asked the network for, and how much wider than the window it is. With FOLDER, pictures are put there.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import puppeteer from "puppeteer-core";

const [page_file, folder] = process.argv.slice(2);
const { chromium } = JSON.parse(readFileSync(0, "utf8"));
const axe = readFileSync(new URL("node_modules/axe-core/axe.min.js", import.meta.url), "utf8");
const browser = await puppeteer.launch({ executablePath: chromium, args: ["--no-sandbox"], protocolTimeout: 300_000 });
const page = await browser.newPage();
const outside = [];
page.on("request", (request) => request.url().startsWith("file:") || outside.push(request.url()));
const seen = [];
try {
  await page.goto(pathToFileURL(page_file).href);
  for (const scheme of ["light", "dark", "print"]) {
    await page.emulateMediaType(scheme === "print" ? "print" : "screen");
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme === "dark" ? "dark" : "light" }]);
    for (const width of [390, 1000, 1600]) {
      await page.setViewport({ width, height: 900 });
      await page.evaluate(() => document.querySelectorAll("details").forEach((one) => (one.open = true)));
      await page.evaluate(axe);
      const found = await page.evaluate(() => axe.run());
      const violations = found.violations.map(({ id, help, nodes }) => ({ id, help, nodes: nodes.map((node) => node.html.slice(0, 200)) }));
      const wider = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      seen.push({ scheme, width, violations, passes: found.passes.length, wider });
      if (folder) await page.screenshot({ path: `${folder}/${scheme}-${width}.png`, fullPage: true });
    }
  }
  console.log(JSON.stringify({ seen, outside }));
} finally {
  await browser.close();
}
