"use strict";
// The page asks the same API as every client does and shows the draft trees that `speculative.trace` brings along.

const byId = (id) => document.getElementById(id);
let steps = [];
let running = null;

async function begin() {
  const headers = authorization();
  const answer = await fetch("/v1/models", { headers });
  if (!answer.ok) {
    byId("model").textContent = "the server wants an API key";
    return;
  }
  const model = (await answer.json()).data[0];
  byId("model").textContent = `${model.id}, ${model.max_model_len} tokens of context`;
  byId("drafter").replaceChildren(...model.drafters.map((name) => new Option(name, name)));
}

function authorization() {
  const key = byId("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function request() {
  const cap = byId("cap").value;
  const speculative = { drafter: byId("drafter").value || null, trace: true };
  if (cap !== "") speculative.max_tokens = Number(cap);
  const shared = {
    stream: true, stream_options: { include_usage: true }, max_tokens: Number(byId("limit").value),
    temperature: Number(byId("temperature").value), seed: Number(byId("seed").value), speculative,
  };
  const prompt = byId("prompt").value;
  return byId("kind").value === "chat"
    ? ["/v1/chat/completions", { ...shared, messages: [{ role: "user", content: prompt }] }]
    : ["/v1/completions", { ...shared, prompt }];
}

async function generate(event) {
  event.preventDefault();
  steps = [];
  byId("text").replaceChildren();
  byId("tree").replaceChildren();
  byId("go").disabled = true;
  byId("stop").disabled = false;
  say("generating …");
  running = new AbortController();
  const started = performance.now();
  try {
    const [path, body] = request();
    const headers = { "Content-Type": "application/json", ...authorization() };
    const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal: running.signal });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const chunk of chunks(answer.body)) take(chunk);
    const seconds = (performance.now() - started) / 1000;
    say(`done: ${numTokens()} tokens in ${seconds.toFixed(2)} s`);
  } catch (error) {
    say(error.name === "AbortError" ? "stopped" : `error: ${error.message}`);
  } finally {
    running = null;
    byId("go").disabled = false;
    byId("stop").disabled = true;
  }
}

async function* chunks(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const line of events) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

function take(chunk) {
  for (const choice of chunk.choices) {
    for (const tree of choice.speculative || []) {
      steps.push(tree);
      for (const node of tree.accepted) show(tree.tokens[node], "accepted");
      if (tree.bonus !== null) show(tree.bonus, "bonus");
    }
  }
  drawNumbers();
  drawChart();
  const slider = byId("step");
  slider.disabled = steps.length === 0;
  slider.max = String(Math.max(steps.length, 1));
  slider.value = slider.max;
  drawTree();
}

function show(text, kind) {
  const span = document.createElement("span");
  span.className = `token ${kind}`;
  span.textContent = text;
  byId("text").append(span);
}

const sum = (values) => values.reduce((total, value) => total + value, 0);
const numDrafted = () => sum(steps.map((tree) => tree.tokens.length - 1));
const numAccepted = () => sum(steps.map((tree) => tree.accepted.length));
const numTokens = () => numAccepted() + steps.filter((tree) => tree.bonus !== null).length;

function drawNumbers() {
  const rate = numDrafted() ? `${(100 * numAccepted() / numDrafted()).toFixed(0)} %` : "–";
  const rows = {
    "tokens": numTokens(), "steps of the model": steps.length, "tokens per step": steps.length ? (numTokens() / steps.length).toFixed(2) : "–",
    "drafted": numDrafted(), "accepted": numAccepted(), "acceptance rate": rate,
  };
  byId("numbers").replaceChildren(...Object.entries(rows).map(([name, value]) => {
    const box = document.createElement("div");
    const term = document.createElement("dt");
    const number = document.createElement("dd");
    term.textContent = name;
    number.textContent = String(value);
    box.append(term, number);
    return box;
  }));
}

function drawChart() {
  const shown = steps.slice(-120);
  const most = Math.max(1, ...shown.map((tree) => tree.tokens.length - 1));
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", `0 0 ${Math.max(shown.length, 20)} ${most}`);
  svg.setAttribute("preserveAspectRatio", "none");
  shown.forEach((tree, index) => {
    for (const [count, kind] of [[tree.tokens.length - 1, "bar-drafted"], [tree.accepted.length, "bar-accepted"]]) {
      const bar = document.createElementNS(space, "rect");
      for (const [name, value] of Object.entries({ x: index + 0.1, y: most - count, width: 0.8, height: count, class: kind })) {
        bar.setAttribute(name, String(value));
      }
      svg.append(bar);
    }
  });
  const chart = byId("chart");
  chart.replaceChildren(svg);
  chart.setAttribute("aria-label", `${steps.length} steps, ${numDrafted()} tokens drafted, ${numAccepted()} accepted`);
}

function drawTree() {
  const number = Number(byId("step").value);
  const tree = steps[number - 1];
  byId("step-number").textContent = tree ? `${number} of ${steps.length}` : "–";
  if (!tree) return;
  const accepted = new Set(tree.accepted);
  const lists = tree.tokens.map(() => document.createElement("ul"));
  const top = document.createElement("ul");
  tree.tokens.forEach((token, node) => {
    const item = document.createElement("li");
    const label = document.createElement("span");
    label.className = node === 0 ? "token" : accepted.has(node) ? "token accepted" : "rejected";
    label.textContent = JSON.stringify(token);
    const kind = document.createElement("span");
    kind.textContent = node === 0 ? " root" : accepted.has(node) ? " accepted" : " rejected";
    item.append(label, kind, lists[node]);
    (node === 0 ? top : lists[tree.parents[node]]).append(item);
  });
  byId("tree").replaceChildren(top);
  if (tree.bonus === null) return;
  const last = tree.accepted.length ? tree.accepted[tree.accepted.length - 1] : 0;
  const bonus = document.createElement("li");
  const label = document.createElement("span");
  label.className = "token bonus";
  label.textContent = JSON.stringify(tree.bonus);
  bonus.append(label, " bonus");
  lists[last].prepend(bonus);
}

function say(text) {
  byId("status").textContent = text;
}

byId("ask").addEventListener("submit", generate);
byId("stop").addEventListener("click", () => running && running.abort());
byId("step").addEventListener("input", drawTree);
byId("key").addEventListener("change", begin);
drawNumbers();
begin();
