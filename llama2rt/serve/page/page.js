"use strict";
// A conversation is kept here alone and is sent whole with each message. All text reaches the page
// through textContent.

const byId = (id) => document.getElementById(id);
const [log, form, message, status] = ["log", "form", "message", "status"].map(byId);
const [send, stop, again, clear] = ["send", "stop", "again", "clear"].map(byId);

let turns = []; // {role, content}, user and assistant in turns
let running = null; // the AbortController of the answer under way

function show(role, text) {
  const turn = document.createElement("div");
  const who = document.createElement("p");
  const body = document.createElement("div");
  turn.className = "turn " + role;
  who.className = "role";
  who.textContent = role === "user" ? "You" : byId("model").textContent;
  body.className = "text";
  body.textContent = text;
  turn.append(who, body);
  log.append(turn);
  log.scrollTop = log.scrollHeight;
  return body;
}

function redraw() {
  log.replaceChildren();
  for (const turn of turns) show(turn.role, turn.content);
}

function settle() {
  send.disabled = running !== null;
  stop.disabled = running === null;
  again.disabled = running !== null || turns.length === 0;
  clear.disabled = running !== null || turns.length === 0;
}

function say(text, wrong) {
  status.textContent = text;
  status.classList.toggle("wrong", Boolean(wrong));
}

function request() {
  const system = byId("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...turns] : turns;
  const number = (id) => Number(byId(id).value);
  return {
    messages,
    stream: true,
    stream_options: { include_usage: true },
    temperature: number("temperature"),
    top_p: number("top_p"),
    max_tokens: number("max_tokens"),
  };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function ask(signal) {
  const key = byId("key").value;
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = "Bearer " + key;
  const body = JSON.stringify(request());
  const response = await fetch("v1/chat/completions", { method: "POST", headers, body, signal });
  if (!response.ok) {
    const refusal = await response.json().catch(() => null);
    throw new Error(refusal?.error?.message ?? "status " + response.status);
  }
  return response;
}

async function answer() {
  running = new AbortController();
  settle();
  say("waiting ...");
  log.setAttribute("aria-busy", "true"); // a screen reader hears the answer once, at its end
  const body = show("assistant", "");
  const began = performance.now();
  let text = "", note = "", wrong = false;
  try {
    for await (const chunk of events(await ask(running.signal))) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) {
        const seconds = (performance.now() - began) / 1000;
        note += (chunk.usage.completion_tokens / seconds).toFixed(1) + " tokens/s";
      }
      const choice = chunk.choices[0];
      if (!choice) continue; // the chunk that counts
      text += choice.delta.content ?? "";
      if (choice.finish_reason === "length") note = "cut at the most tokens; ";
      body.textContent = text;
      log.scrollTop = log.scrollHeight;
      say("answering ...");
    }
  } catch (error) {
    wrong = error.name !== "AbortError";
    note = wrong ? error.message : "stopped";
  }
  log.removeAttribute("aria-busy");
  if (text.trim()) {
    turns.push({ role: "assistant", content: text });
  } else {
    // Without an answer the message goes back to where it can be changed and sent again.
    const asked = turns.pop().content;
    if (!message.value) message.value = asked;
    if (!wrong && note !== "stopped") note = "the answer was empty";
    redraw();
  }
  running = null;
  settle();
  say(note, wrong);
  message.focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = message.value.trim();
  if (!text || running) return;
  message.value = "";
  turns.push({ role: "user", content: text });
  show("user", text);
  answer();
});

message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});

stop.addEventListener("click", () => running?.abort());

again.addEventListener("click", () => {
  if (running || turns.length === 0) return;
  turns.pop();
  redraw();
  answer();
});

clear.addEventListener("click", () => {
  if (running) return;
  turns = [];
  redraw();
  settle();
  say("");
  message.focus();
});
