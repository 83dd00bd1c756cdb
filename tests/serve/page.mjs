// node page.mjs ADDRESS: opens the built-in page in Chromium, fills its form as stdin says, turn by turn, and prints what was seen.
import { readFileSync } from "node:fs";
import puppeteer from "puppeteer-core";

const [address] = process.argv.slice(2);
const { chromium, turns } = JSON.parse(readFileSync(0, "utf8"));
const browser = await puppeteer.launch({ executablePath: chromium, args: ["--no-sandbox"] });
const page = await browser.newPage();
const [outside, errors] = [[], []];
page.on("request", (request) => request.url().startsWith(address) || outside.push(request.url()));
page.on("console", (message) => message.type() === "error" && errors.push(`${message.text()} ${message.location().url}`));
page.on("pageerror", (error) => errors.push(String(error)));

try {
  await page.goto(address);
  await page.waitForFunction(() => document.getElementById("name").textContent !== "qft");
  const seen = [];
  for (const fields of turns) {
    const before = await page.$$eval("#out .turn", (said) => said.length);
    for (const [id, text] of Object.entries(fields)) await page.type(`#${id}`, text);
    await page.click("#send");
    const answered = (count) => document.querySelectorAll("#out .turn").length > count + 1 && !document.getElementById("send").disabled;
    await page.waitForFunction(answered, { timeout: 60_000 }, before);
    const said = await page.$$eval("#out .turn", (all) => all.map((turn) => [turn.className.replace("turn ", ""), turn.innerText]));
    seen.push(...said.slice(before));
  }
  const hidden = await page.$$eval("form [hidden]", (all) => all.map((field) => field.id));
  console.log(JSON.stringify({ title: await page.title(), seen, hidden, outside, errors }));
} finally {
  await browser.close();
}
