"use strict";
/* A chat that shows who proposed every token, and the server's figures. Talks to the same routes as any client. */

const $ = (id) => document.getElementById(id);
const HUES = ["#2a78d6", "#d97706", "#0f9d76", "#a855c7", "#d6336c", "#6b7f00"];
const EXAMPLES = [
  "Write a Python function that checks whether a word is a palindrome.",
  "Mary has 12 apples and gives away a third of them. How many are left? Think step by step.",
  "Explain in three sentences why the sky is blue.",
];
const colours = new Map(); // of a drafter, or of several joined with +
const conversation = [];
let model = "", running = null;

/* Requests ------------------------------------------------------------------------------------------------------- */

function headers() {
  const found = { "Content-Type": "application/json" };
  if ($("key").value) found.Authorization = `Bearer ${$("key").value}`;
  return found;
}

async function problem(reply) {
  try {
    const body = await reply.json();
    if (body.error && body.error.message) return body.error.message;
  } catch { /* not JSON */ }
  return `The server answered ${reply.status}.`;
}

async function findModel() {
  try {
    const reply = await fetch("/v1/models", { headers: headers() });
    if (!reply.ok) {
      $("model").textContent = reply.status === 401 ? "needs an API key, see Settings" : await problem(reply);
      return;
    }
    const card = (await reply.json()).data[0];
    model = card.id;
    $("model").textContent = `${card.id}, up to ${card.max_model_len} tokens`;
  } catch {
    $("model").textContent = "the server does not answer";
  }
}

/* The events of a stream, as parsed JSON. */
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/* Conversation --------------------------------------------------------------------------------------------------- */

function colourOf(names) {
  const key = names.join(" + ");
  if (!colours.has(key)) {
    colours.set(key, HUES[colours.size % HUES.length]);
    drawLegend();
  }
  return colours.get(key);
}

function drawLegend() {
  const own = document.createElement("span");
  own.className = "own";
  own.append(document.createElement("i"), "the model itself");
  const parts = [own];
  for (const [key, colour] of colours) {
    const part = document.createElement("span");
    part.style.setProperty("--by", colour);
    part.append(document.createElement("i"), `drafted by ${key.replace(" + ", " and ")}, accepted`);
    parts.push(part);
  }
  $("legend").replaceChildren(...parts);
}

function addMessage(role) {
  $("welcome").hidden = true;
  const box = document.createElement("div");
  box.className = `message ${role}`;
  const who = document.createElement("div");
  who.className = "who";
  who.textContent = role === "user" ? "You" : model;
  const text = document.createElement("div");
  text.className = "text";
  box.append(who, text);
  $("messages").append(box);
  return { box, text };
}

function addTokens(text, choice) {
  const tokens = choice.token_texts || (choice.delta.content ? [choice.delta.content] : []);
  tokens.forEach((token, place) => {
    const names = (choice.drafters || [])[place] || [];
    const span = document.createElement("span");
    span.className = place ? "token" : "token first";
    span.textContent = token;
    if (names.length) {
      span.dataset.by = names.join(" + ");
      span.style.setProperty("--by", colourOf(names));
      span.title = `drafted by ${names.join(" and ")}`;
    } else {
      span.title = "the model's own token";
    }
    text.append(span);
  });
}

/* Scroll along unless the reader has scrolled up. */
function keepingBottom(change) {
  const log = $("messages");
  const atBottom = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (atBottom) log.scrollTop = log.scrollHeight;
}

function requestBody() {
  const messages = $("system").value ? [{ role: "system", content: $("system").value }] : [];
  const body = {
    model, messages: messages.concat(conversation), stream: true,
    stream_options: { include_usage: true, include_drafters: true },
    temperature: Number($("temperature").value) || 0,
    max_tokens: Number($("most").value) || 256,
  };
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  return body;
}

function summary(count, steps, began, first, ended, usage) {
  const seconds = (ended - first) / 1000;
  const parts = [`${count} tokens`];
  if (count > 1 && seconds > 0) parts.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
  if (steps > 1) parts.push(`${((count - 1) / (steps - 1)).toFixed(2)} tokens a pass`);
  parts.push(`first after ${((first - began) / 1000).toFixed(2)} s`);
  const details = usage && usage.completion_tokens_details;
  if (details && details.accepted_prediction_tokens !== undefined) {
    parts.push(`${details.accepted_prediction_tokens} drafts accepted, ${details.rejected_prediction_tokens} rejected`);
  }
  const cached = usage && usage.prompt_tokens_details && usage.prompt_tokens_details.cached_tokens;
  if (cached) parts.push(`${cached} of ${usage.prompt_tokens} prompt tokens reused`);
  return parts.join(" · ");
}

async function ask(question) {
  conversation.push({ role: "user", content: question });
  addMessage("user").text.textContent = question;
  const { box, text } = addMessage("assistant");
  const figures = document.createElement("div");
  figures.className = "figures";
  box.append(figures);
  keepingBottom(() => { $("messages").scrollTop = $("messages").scrollHeight; });
  running = new AbortController();
  $("send").textContent = "Stop";
  const began = performance.now();
  let first = 0, last = 0, count = 0, steps = 0, usage = null, answer = "", failure = "";
  try {
    if (!model) await findModel();
    const reply = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(requestBody()), signal: running.signal,
    });
    if (!reply.ok) throw new Error(await problem(reply));
    for await (const event of events(reply)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      for (const choice of event.choices || []) {
        const tokens = (choice.token_texts || []).length;
        if (!tokens && !choice.delta.content) continue;
        last = performance.now();
        first = first || last;
        count += tokens;
        steps += 1;
        answer += choice.delta.content || "";
        keepingBottom(() => addTokens(text, choice));
        if (steps > 2) figures.textContent = summary(count, steps, began, first, last, null);
      }
    }
  } catch (error) {
    failure = running.signal.aborted ? "stopped" : error.message || String(error);
  }
  if (first) figures.textContent = summary(count, steps, began, first, last, usage);
  if (failure) {
    const line = document.createElement("div");
    line.className = "failed";
    line.textContent = failure;
    box.append(line);
  }
  if (answer) conversation.push({ role: "assistant", content: answer });
  else conversation.pop();
  keepingBottom(() => {});
  $("announce").textContent = failure || "The answer is complete.";
  running = null;
  $("send").textContent = "Send";
}

function fit() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
}

function submit() {
  const question = $("prompt").value.trim();
  if (running || !question) return;
  $("prompt").value = "";
  fit();
  ask(question);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else submit();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
$("prompt").addEventListener("input", fit);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
$("clear").addEventListener("click", () => {
  if (running) running.abort();
  conversation.length = 0;
  document.querySelectorAll(".message").forEach((box) => box.remove());
  $("welcome").hidden = false;
  $("prompt").focus();
});
$("fields").addEventListener("submit", (event) => event.preventDefault());
$("colours").addEventListener("change", () => $("chat").classList.toggle("coloured", $("colours").checked));
$("key").addEventListener("change", findModel);
for (const example of EXAMPLES) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = example;
  button.addEventListener("click", () => { $("prompt").value = example; submit(); });
  $("examples").append(button);
}

/* Status --------------------------------------------------------------------------------------------------------- */

const history = []; // [seconds, tokens given so far]
let timer = 0;

/* Samples of Prometheus's text format: name, labels, value. */
function parseMetrics(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = /^(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!found) continue;
    const labels = {};
    for (const [, name, value] of (found[2] || "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[name] = value;
    samples.push({ name: found[1], labels, value: Number(found[3]) });
  }
  return samples;
}

function showStatus(text) {
  const samples = parseMetrics(text);
  const sum = (name, labels = {}) => samples
    .filter((s) => s.name === name && Object.entries(labels).every(([key, value]) => s.labels[key] === value))
    .reduce((total, s) => total + s.value, 0);
  const mean = (name, labels) => sum(`${name}_sum`, labels) / (sum(`${name}_count`, labels) || NaN);
  const shown = (value, digits = 0, unit = "") => (Number.isFinite(value) ? value.toFixed(digits) + unit : "–");
  // Tokens of rounds as they come; the counter of tokens moves only when a request ends.
  history.push([performance.now() / 1000, sum("dspark_accepted_length_sum")]);
  while (history.length > 61) history.shift();
  const tiles = [
    ["tokens a second", shown(speeds().at(-1) ?? NaN, 1)],
    ["running", `${shown(sum("dspark_running"))} of ${shown(sum("dspark_rows"))}`],
    ["waiting", shown(sum("dspark_waiting"))],
    ["tokens a request gets in a pass", shown(mean("dspark_accepted_length"), 2)],
    ["to the first token, mean", shown(1e3 * mean("dspark_time_to_first_token_seconds"), 0, " ms")],
    ["between tokens, mean", shown(1e3 * mean("dspark_inter_token_seconds"), 1, " ms")],
    ["prompts with reused context", `${shown(sum("dspark_prefix_hits_total"))} of ${shown(sum("dspark_prefix_lookups_total"))}`],
    ["cache in use", shown(100 * sum("dspark_slots_used") / sum("dspark_slots"), 0, " %")],
    ["rounds with drafts", shown(100 * sum("dspark_rounds_total", { kind: "speculative" }) / sum("dspark_rounds_total"), 0, " %")],
  ].map(([name, value]) => {
    const tile = document.createElement("div");
    tile.className = "tile";
    const figure = document.createElement("b");
    figure.textContent = value;
    const label = document.createElement("span");
    label.textContent = name;
    tile.append(figure, label);
    return tile;
  });
  $("tiles").replaceChildren(...tiles);
  const names = [...new Set(samples.filter((s) => s.name === "dspark_drafted_total").map((s) => s.labels.drafter))];
  $("drafters").tBodies[0].replaceChildren(...names.map((drafter) => {
    const [proposed, verified, accepted] = ["drafted", "verified", "accepted"].map((kind) => sum(`dspark_${kind}_total`, { drafter }));
    const row = document.createElement("tr");
    const cells = [drafter, shown(proposed), shown(verified), shown(accepted), shown(100 * accepted / verified, 0, " %")];
    row.append(...cells.map((cell) => Object.assign(document.createElement("td"), { textContent: cell })));
    return row;
  }));
  drawSpeed();
}

function speeds() {
  return history.slice(1).map(([at, tokens], place) => Math.max(tokens - history[place][1], 0) / (at - history[place][0]));
}

function drawSpeed() {
  const canvas = $("speed"), ratio = window.devicePixelRatio || 1, values = speeds();
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = 120 * ratio;
  const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  pen.scale(ratio, ratio);
  const most = Math.max(...values, 1), width = canvas.clientWidth - 16;
  const x = (place) => 8 + width * (place + 60 - values.length) / 59, y = (value) => 110 - 88 * value / most;
  pen.font = "12px system-ui, sans-serif";
  pen.fillStyle = style.getPropertyValue("--quiet");
  pen.fillText(`${most.toFixed(0)} tokens/s`, 8, 14);
  pen.strokeStyle = style.getPropertyValue("--line");
  pen.strokeRect(8, 110, width, 0);
  if (!values.length) return;
  pen.strokeStyle = style.getPropertyValue("--accent");
  pen.lineWidth = 2;
  pen.beginPath();
  values.forEach((value, place) => (place ? pen.lineTo(x(place), y(value)) : pen.moveTo(x(place), y(value))));
  pen.stroke();
}

async function poll() {
  try {
    const reply = await fetch("/metrics", { headers: headers() });
    if (reply.ok) showStatus(await reply.text());
  } catch { /* the next one may succeed */ }
  timer = window.setTimeout(poll, 2000);
}

/* Tabs ----------------------------------------------------------------------------------------------------------- */

function show(view) {
  for (const name of ["chat", "status"]) {
    $(name).hidden = name !== view;
    $(`tab-${name}`).setAttribute("aria-selected", String(name === view));
    $(`tab-${name}`).tabIndex = name === view ? 0 : -1;
  }
  window.clearTimeout(timer);
  if (view === "status") poll();
}

for (const name of ["chat", "status"]) $(`tab-${name}`).addEventListener("click", () => show(name));
document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  const other = $("chat").hidden ? "chat" : "status";
  show(other);
  $(`tab-${other}`).focus();
});

$("chat").classList.add("coloured");
drawLegend();
findModel();
