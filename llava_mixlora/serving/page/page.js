// The conversation: questions with pictures, and the answers of one model, or of two side by side.

import { ApiError, chat, hasKey, models, trainingTasks, useKey } from "./api.js";
import { routesView } from "./routes.js";

const $ = (id) => document.getElementById(id);
const about = new Map(); // what the server tells of each model, by its name
const tasksOf = new Map(); // promises of the training tasks, by the name of the model
let turns = []; // { text, picture, answers: Map of model to text }
let picture = null; // of the next question, as data
let running = null; // an AbortController while an answer comes

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function complain(error) {
  const wantsKey = error instanceof ApiError && error.status === 401;
  $("key-form").hidden = !wantsKey;
  if (wantsKey) $("key").focus();
  $("problem").textContent = wantsKey && !hasKey() ? "" : error.message;
}

async function begin() {
  try {
    for (const model of await models()) about.set(model.id, model);
  } catch (error) {
    complain(error);
    return;
  }
  $("key-form").hidden = true;
  $("problem").textContent = "";
  const choices = [...about.values()].flatMap(({ id, parent }) => {
    return about.has(parent) ? [[id], [id, parent]] : [[id]];
  });
  $("models").replaceChildren(
    ...choices.map((names) => {
      const option = element("option", "", names.length > 1 ? `Side by side: ${names.join(" and ")}` : names[0]);
      option.value = JSON.stringify(names);
      return option;
    }),
  );
  $("models").disabled = false;
  $("question").focus();
}

function tasksWhereKnown(model) {
  if (!tasksOf.has(model)) tasksOf.set(model, trainingTasks(model).catch(() => null));
  return tasksOf.get(model);
}

// Pictures: chosen, pasted or dropped.

function attach(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) {
    $("problem").textContent = `${file.name} is no picture.`;
    return;
  }
  const reader = new FileReader();
  reader.onload = () => show(reader.result);
  reader.onerror = () => ($("problem").textContent = `${file.name} cannot be read.`);
  reader.readAsDataURL(file);
}

function show(data) {
  picture = data;
  $("attached").hidden = data === null;
  if (data === null) $("preview").removeAttribute("src");
  else $("preview").src = data;
  $("status").textContent = data === null ? "" : "A picture goes with your question.";
  $("problem").textContent = "";
  $("file").value = "";
}

function attachFrom(event, transfer) {
  const [file] = transfer?.files ?? [];
  if (file) event.preventDefault();
  attach(file);
}

// Questions and answers.

function messagesFor(model) {
  const messages = [];
  turns.forEach(({ text, picture, answers }, number) => {
    const answer = answers.get(model) || [...answers.values()].find(Boolean);
    const isLast = number === turns.length - 1;
    if (!isLast && !answer) return; // a question that nobody has answered
    const parts = picture === null ? [] : [{ type: "image_url", image_url: { url: picture } }];
    if (text) parts.push({ type: "text", text });
    messages.push({ role: "user", content: parts });
    if (!isLast) messages.push({ role: "assistant", content: answer });
  });
  return messages;
}

function settings() {
  const given = { temperature: $("temperature").valueAsNumber, max_tokens: $("longest").valueAsNumber };
  return Object.fromEntries(Object.entries(given).filter(([, value]) => !Number.isNaN(value)));
}

// Shows an answer as it comes; false where it could not be had.
async function answer(model, turn, view, signal) {
  const text = element("p", "text");
  view.append(element("h2", "", model), text);
  view.setAttribute("aria-busy", "true");
  const note = (words, className = "note") => view.append(element("p", className, words));
  try {
    const body = { model, messages: messagesFor(model), ...settings() };
    for await (const { choices, mixlora_routes: routes } of chat(body, signal)) {
      const [{ delta, finish_reason: finish }] = choices;
      text.textContent += delta.content ?? "";
      turn.answers.set(model, text.textContent);
      if (finish === "length") note("Cut off at the longest answer (Settings).");
      if (finish && !text.textContent) note("The model says nothing.");
      if (routes) showRoutes(model, routes, view);
    }
  } catch (error) {
    if (error.name === "AbortError") note("Stopped.");
    else {
      note(error.message, "note wrong");
      if (error.status === 401) complain(error);
      return false;
    }
  } finally {
    view.setAttribute("aria-busy", "false");
  }
  return true;
}

function showRoutes(model, routes, view) {
  const { mixlora } = about.get(model);
  if (!mixlora) return;
  const drawn = routesView(routes, mixlora, null);
  view.append(drawn);
  tasksWhereKnown(model).then((known) => {
    if (!known?.tasks.length) return;
    const better = routesView(routes, mixlora, known);
    better.open = drawn.open;
    drawn.replaceWith(better);
  });
}

async function send() {
  const text = $("question").value.trim();
  if (running || $("models").disabled || (!text && picture === null)) return;
  const turn = { text, picture, answers: new Map() };
  turns.push(turn);
  const asked = element("div", "asked");
  if (picture !== null) {
    const image = element("img");
    Object.assign(image, { src: picture, alt: "Your picture" });
    asked.append(image);
  }
  asked.append(element("p", "", text));
  const answers = element("div", "answers");
  $("conversation").append(asked, answers);
  $("question").value = "";
  show(null);
  const mine = (running = new AbortController());
  $("stop").disabled = false;
  $("send").setAttribute("aria-disabled", "true");
  $("status").textContent = "Answering";
  const names = JSON.parse($("models").value);
  const views = names.map((name) => element("article", "answer"));
  answers.append(...views);
  answers.scrollIntoView({ block: "nearest" });
  const had = await Promise.all(names.map((name, number) => answer(name, turn, views[number], mine.signal)));
  if (running !== mine) return; // a new conversation has begun
  if (!had.includes(true) && !$("question").value && picture === null) {
    show(turn.picture); // to be asked again
    $("question").value = turn.text;
  }
  rest(mine.signal.aborted ? "Stopped" : had.includes(true) ? "Answered" : "Not answered");
}

function rest(words) {
  running = null;
  if (document.activeElement === $("stop")) $("question").focus();
  $("stop").disabled = true;
  $("send").setAttribute("aria-disabled", "false");
  $("status").textContent = words;
}

function stop() {
  running?.abort();
}

function anew() {
  stop();
  turns = [];
  $("conversation").replaceChildren();
  $("problem").textContent = "";
  show(null);
  rest("");
  $("question").focus();
}

function on(target, event, act) {
  target.addEventListener(event, act);
}

function onSubmit(form, act) {
  on(form, "submit", (event) => {
    event.preventDefault();
    act();
  });
}

on($("file"), "change", () => attach($("file").files[0]));
on($("remove"), "click", () => {
  show(null);
  $("question").focus();
});
on($("stop"), "click", stop);
on($("anew"), "click", anew);
onSubmit($("composer"), send);
onSubmit($("key-form"), () => {
  useKey($("key").value.trim());
  begin();
});
on($("question"), "keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
on(document, "keydown", (event) => {
  if (event.key === "Escape") stop();
});
on(document, "paste", (event) => attachFrom(event, event.clipboardData));
on(document, "dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragged");
});
on(document, "dragleave", () => document.body.classList.remove("dragged"));
on(document, "drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragged");
  attachFrom(event, event.dataTransfer);
});

begin();
