// node page.mjs ADDRESS: opens the web app in Chromium, asks and checks what stdin says, and prints what was seen as JSON.
import { readFileSync } from "node:fs";
import puppeteer from "puppeteer-core";

const [address] = process.argv.slice(2);
const { chromium, questions } = JSON.parse(readFileSync(0, "utf8"));
const software = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"];
const browser = await puppeteer.launch({ executablePath: chromium, args: ["--no-sandbox", ...software], protocolTimeout: 600_000 });
const page = await browser.newPage();
const [outside, errors] = [[], []];
page.on("request", (request) => /^(blob|data):/.test(request.url()) || request.url().startsWith(new URL(address).origin) || outside.push(request.url()));
page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
page.on("pageerror", (error) => errors.push(String(error)));

const text = (selector) => page.$eval(selector, (element) => element.innerText);
const ready = async () => {
  await page.waitForFunction(() => !document.getElementById("check").disabled || /fail|cannot/.test(document.getElementById("state").textContent), { timeout: 300_000 });
  const state = await text("#state");
  if (state) throw new Error(`the page says: ${state} ${errors}`);
};

try {
  await page.goto(address);
  await ready();
  const answers = [];
  for (const question of questions) {
    for (const [name, value] of Object.entries(question)) {
      const field = await page.$(`[name="${name}"]`);
      if (name === "sound") await field.uploadFile(value);
      else await field.evaluate((element, given) => (element.value = given), value);
    }
    await page.click("#ask");
    await ready();
    answers.push(await text("#answer"));
  }
  await page.click("#check");
  await ready();
  const [isolated, gpu] = await page.evaluate(async () => [crossOriginIsolated, Boolean(await navigator.gpu?.requestAdapter())]);
  console.log(JSON.stringify({ title: await page.title(), answers, checked: await text("#checked"), outside, errors, isolated, gpu }));
} finally {
  await browser.close();
}
